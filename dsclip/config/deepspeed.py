"""Reads the DeepSpeed JSON strictly and fills in its "auto" sizes from the recipe.

DeepSpeed 0.19.8 ignores unknown keys at the top level, so a typo there would silently do nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from dsclip.config.schema import BatchSection, Recipe
from dsclip.errors import UserError, did_you_mean

# Every top-level key that DeepSpeed 0.19.8 reads (runtime/config.py and the modules it calls).
KNOWN_KEYS = """
activation_checkpointing aio allow_nonfinite amp autotuning bf16 bfloat16 checkpoint comms_logger
communication_data_type compile compression_training csv_monitor curriculum_learning data_efficiency data_types
dataloader_drop_last disable_allgather disable_python_gc dump_state elasticity eigenvalue expert_parallel
flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping gradient_predivide_factor
graph_harvesting hybrid_engine legacy_fusion log_level managed_gradient_accumulation memory_breakdown monitor_config
nebula optimizer pipeline prescale_gradients progressive_layer_drop quantize_training scheduler
seq_parallel_communication_data_type sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard
timers torch_autocast train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism
vocabulary_size wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer
zero_force_ds_cpu_optimizer zero_optimization
""".split()

SMALL_PARAMETER = 100_000  # elements

# Keys DeepSpeed knows and dsclip can't obey, with what to use instead.
REFUSED = {
    "optimizer": "the recipe's `optim` section chooses the optimizer",
    "scheduler": "the recipe's `optim` section sets the learning rate: lr, warmup_steps, schedule",
    "amp": "NVIDIA's apex is not supported; use bf16",
    "torch_autocast": "use bf16: its fp32 master weights give the same precision",
    "pipeline": "use ZeRO stage 3 to shard the model",
    "tensor_parallel": "use ZeRO stage 3 to shard the model",
    "hybrid_engine": "it is meant for text generation",
    "compression_training": "train in bf16 and compress the converted model",
    "tensorboard": "dsclip writes TensorBoard files itself, to runs/NAME/tb",
    "progressive_layer_drop": "use model.patch_dropout to train faster",
}


def load_ds_config(path: str | Path, recipe: Recipe, world_size: int) -> dict:
    """The DeepSpeed configuration with every size resolved.

    Raises UserError for unknown keys, for settings dsclip can't obey, and for numbers that contradict the recipe.
    """
    path = Path(path)
    config = _read_json(path)
    for key in config:
        if key not in KNOWN_KEYS:
            raise UserError(
                f"{path}: unknown key `{key}`.{did_you_mean(key, KNOWN_KEYS)} DeepSpeed would ignore it silently."
            )
        if key in REFUSED:
            raise UserError(f"{path}: remove `{key}`: {REFUSED[key]}.")
    _check_precision_and_stage(config, path)
    _check_reduction(config, path, recipe)
    return config | _sizes(config, path, recipe, world_size) | _defaults(config)


def resolve_persistence(config: dict, batch: BatchSection) -> dict:
    """The configuration with an "auto" stage3_param_persistence_threshold resolved: gradients that are reduced once a step go
    with parameters that are gathered once a step; otherwise only small ones (norms, biases) stay on every rank.
    """
    zero = config["zero_optimization"]
    if zero.get("stage3_param_persistence_threshold") != "auto":
        return config
    keep = {"stage3_param_persistence_threshold": SMALL_PARAMETER}
    if batch.coalesce_reduction:
        keep = {"stage3_param_persistence_threshold": 10**12, "stage3_model_persistence_threshold": 10**13}
    return config | {"zero_optimization": zero | keep}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"--ds_config {path}: no such file. Those that come with dsclip are in ds_configs/.")

    def unique(pairs):
        keys = [k for k, _ in pairs]
        if twice := {k for k in keys if keys.count(k) > 1}:
            raise UserError(f"{path}: key `{sorted(twice)[0]}` stands there twice")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object")
    return config


def _check_precision_and_stage(config: dict, path: Path) -> None:
    fp16 = config.get("fp16")
    if isinstance(fp16, dict) and fp16.get("enabled"):
        raise UserError(
            f"{path}: fp16 is not supported: large CLIP runs diverged with it and bf16 fixed them. Set bf16.enabled to true."
        )
    bf16 = config.get("bf16")
    if isinstance(bf16, dict) and bf16.get("check_grad_overflow") is False:
        raise UserError(
            f"{path}: remove bf16.check_grad_overflow: without it ZeRO-2 would put gradients that are not finite into the weights."
        )
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage not in (1, 2, 3):
        raise UserError(
            f"{path}: zero_optimization.stage is {stage!r}; choose 1 (shards the optimizer), 2 (also the gradients) or "
            "3 (also the parameters)."
        )
    offload = zero.get("offload_param") or {}
    if offload.get("device", "none") != "none" and stage != 3:
        raise UserError(f"{path}: zero_optimization.offload_param needs stage 3, and the stage is {stage}.")


def _check_reduction(config: dict, path: Path, recipe: Recipe) -> None:
    stage = config["zero_optimization"]["stage"]
    if recipe.batch.coalesce_reduction and stage == 1:
        raise UserError(
            f"{path}: batch.coalesce_reduction needs ZeRO stage 2 or 3, and the stage is 1, which reduces once a step anyway."
        )


def _sizes(config: dict, path: Path, recipe: Recipe, world_size: int) -> dict:
    total = recipe.batch.global_batch_size
    if total % world_size:
        lower = total // world_size * world_size
        raise UserError(
            f"batch.global_batch_size is {total}, which {world_size} ranks can't share equally; "
            f"use {lower or world_size} or {lower + world_size}."
        )
    expected = {
        "train_batch_size": (total, "batch.global_batch_size"),
        "train_micro_batch_size_per_gpu": (total // world_size, f"batch.global_batch_size / {world_size} ranks"),
        # dsclip accumulates itself, on the exact loss of the global batch.
        "gradient_accumulation_steps": (
            1,
            "batch.samples_per_forward, which splits the batch exactly; it leaves this at",
        ),
    }
    for key, (value, origin) in expected.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise UserError(
                f'{path}: `{key}` is {given!r}, but the recipe gives {value} ({origin} {value}). Write "auto", or change the recipe.'
            )
    return {key: value for key, (value, _) in expected.items()}


def _defaults(config: dict) -> dict:
    """What a run needs whether or not the file says it."""
    return {
        # The optimizer is torch's AdamW, with our parameter groups; DeepSpeed calls any but its own untested.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": config.get("steps_per_print") or 10**9,
        # DeepSpeed's default of 1.0 would clip unasked.
        "gradient_clipping": config.get("gradient_clipping", 0.0),
    }
