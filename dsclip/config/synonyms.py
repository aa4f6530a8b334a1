"""Names that other programs give to keys of the recipe, and how their values are converted."""

from __future__ import annotations

import json
import math
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

from dsclip.config.schema import BatchSection, Recipe
from dsclip.errors import did_you_mean

SYNONYMS = {
    "optim.name": "optimizer optimizer_name optim_name opt optimizer_type",
    "optim.ema": "ema_decay ema_momentum weight_average model_ema model_ema_decay",
    "optim.momentum": "muon_momentum",
    "optim.lr": "learning_rate learningrate base_lr max_lr peak_lr",
    "optim.min_lr": "lr_min final_lr end_lr lr_end",
    "optim.weight_decay": "wd decay weightdecay",
    "optim.warmup_steps": "warmup warmup_iters num_warmup_steps",
    "optim.layer_decay": "layer_decay_rate layerwise_decay llrd layer_lr_decay",
    "optim.decay_share": "decay_fraction cooldown_fraction cooldown",
    "optim.schedule": "lr_scheduler scheduler lr_schedule",
    "optim.beta1": "betas adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.eps": "epsilon adam_eps adam_epsilon",
    "batch.global_batch_size": "batch batch_size batchsize bs train_batch_size global_batch",
    "batch.micro_batch_size": "micro_batch microbatch microbatch_size accum_batch_size samples_per_forward",
    "batch.chunk_size": "chunk accum_chunk",
    "batch.checkpointing": "grad_checkpointing gradient_checkpointing activation_checkpointing",
    "train.steps": "max_steps num_steps iterations iters train_steps total_steps max_train_steps",
    "train.save_every": "save_steps save_frequency save_freq checkpoint_every",
    "train.log_every": "log_steps logging_steps log_every_n_steps log_interval",
    "train.keep_checkpoints": "save_total_limit keep",
    "train.output": "output_dir out output_folder logs",
    "train.compile": "torchcompile torch_compile",
    "model.preset": "model_name architecture arch name_of_model",
    "model.init": "pretrained checkpoint init_from weights",
    "model.patch_dropout": "force_patch_dropout",
    "data.train_shards": "train_data shards dataset data_path train_dataset",
    "data.workers": "num_workers dataloader_num_workers",
    "data.resampled": "dataset_resampled",
    "eval.every_steps": "eval_steps eval_every val_frequency zeroshot_frequency",
    "eval.zeroshot_shards": "imagenet_val zeroshot",
    "eval.retrieval_shards": "val_data retrieval",
    "loss.init_temperature": "temperature_init init_temp",
}
MEANS = {word: key for key, words in SYNONYMS.items() for word in words.split()}
# Settings that other programs have and dsclip says otherwise.
CONVERTED = {
    "warmup_epochs": "Set `optim.warmup_steps`: epochs × samples of the data set / batch.global_batch_size.",
    "per_device_train_batch_size": "Set `batch.global_batch_size`: it times the number of ranks.",
    "batch_size_per_gpu": "Set `batch.global_batch_size`: it times the number of ranks.",
    "gradient_accumulation_steps": "Set `batch.global_batch_size` to all samples of a step; the micro-batch is planned "
    "from memory, or `batch.micro_batch_size`.",
    "accum_freq": "Set `batch.global_batch_size` to all samples of a step; the micro-batch is planned from memory, or "
    "`batch.micro_batch_size`.",
    "precision": "The DeepSpeed JSON decides: `bf16`.",
    "grad_clip_norm": "The DeepSpeed JSON decides: `gradient_clipping`.",
    "max_grad_norm": "The DeepSpeed JSON decides: `gradient_clipping`.",
    "logit_scale": "Set `loss.init_temperature`: 1 / logit scale.",
}
EPOCHS = ("epochs", "epoch", "num_epochs", "max_epochs", "num_train_epochs")


def suggestion(key: str, section: str | None, value: Any, tree: dict[str, Any]) -> str:
    """What to write for a key that `section` (None: no section was given) doesn't have; empty where nothing is close.

    value: what the key was set to; tree: the whole recipe as it was read, for sizes that a conversion needs.
    """
    if key in EPOCHS:
        return f" {_epochs(value, tree)}"
    if key in CONVERTED:
        return f" {CONVERTED[key]}"
    if key in MEANS:
        return f" Did you mean `{MEANS[key]}`?"
    homes = {name: [f.name for f in fields(cls)] for name, cls in typing.get_type_hints(Recipe).items()}
    if section in homes and (close := did_you_mean(key, homes[section])):
        return close
    if found := [f"{name}.{key}" for name, keys in homes.items() if key in keys]:
        return f" Did you mean `{'` or `'.join(found)}`?"
    return did_you_mean(key, list(homes)) if section is None else ""


def _epochs(value: Any, tree: dict[str, Any]) -> str:
    """How many steps so many epochs are, with the batch and, where a manifest is at hand, the samples of this recipe."""
    batch = _get(tree, "batch", "global_batch_size") or BatchSection().global_batch_size
    epochs = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    samples = _samples(_get(tree, "data", "train_shards"))
    if epochs and samples and isinstance(batch, int):
        steps = math.ceil(epochs * samples / batch)
        return f"Set `train.steps={steps}`: {epochs:g} × {samples} samples / a global batch of {batch}."
    return (
        f"Set `train.steps`: {'epochs' if epochs is None else f'{epochs:g}'} × samples / {batch}, the global batch. The "
        "shards' manifest.json has the samples of each shard."
    )


def _get(tree: dict[str, Any], section: str, key: str) -> Any:
    keys = tree.get(section)
    return keys.get(key) if isinstance(keys, dict) else None


def _samples(shards: Any) -> int | None:
    """Samples by the manifest of a local set; None where there is none to read."""
    if not isinstance(shards, str) or not shards:
        return None
    path = Path(shards)
    try:
        manifest = json.loads((path / "manifest.json" if path.is_dir() else path).read_text(encoding="utf-8"))
        return sum(int(shard["samples"]) for shard in manifest["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
