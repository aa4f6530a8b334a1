"""HuggingFace folders, written: what `CLIPModel` or `SiglipModel`, a processor and the zero-shot pipeline load offline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsclip.checkpoint import Checkpoint
from dsclip.convert.finite import finite
from dsclip.convert.folder import whole_folder, write_json
from dsclip.convert.model_card import Metrics, model_card
from dsclip.convert.safetensors_file import write_one_file
from dsclip.convert.tokenizer_folder import write_tokenizer
from dsclip.convert.weights import Named, fitting, to_hf, to_siglip
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig
from dsclip.model.config import TOWER_OPTIONS

TRAINING_DATA = "training_data.json"  # so that results on training pairs are known for what they are
MAX_SHARD_GB = 5.0  # of a weight file, as transformers had it for long
HF_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_hf(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str = "fp32",
    metrics: Metrics | None = None,
    data: dict[str, str] | None = None,
    overwrite: bool = False,
    max_shard_gb: float = MAX_SHARD_GB,
) -> None:
    """Writes the checkpoint as a HuggingFace folder: safetensors, configuration, preprocessing, tokenizer, model card.

    metrics: {task: {metric: value}} and data: {task: what it was measured on} for the card. max_shard_gb: 10⁹ bytes of a
    weight file, of which one at a time is in memory. Written aside and renamed, so `out` is whole or absent. Raises
    UserError when `out` exists with content and `overwrite` is not set, and as `hf_class`.
    """
    hf_class(checkpoint.config)
    with whole_folder(Path(out), overwrite=overwrite) as temporary:
        _write(checkpoint, temporary, dtype, metrics or {}, data or {}, int(max_shard_gb * 1e9))


def _write(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: str,
    metrics: Metrics,
    data: dict[str, str],
    most: int,
) -> None:
    clip = hf_class(checkpoint.config) == "CLIPModel"
    # SigLIP's tokens all see each other, padding too: a processor that gave an attention mask would change its features.
    more = {} if clip else {"model_input_names": ["input_ids"]}
    write_tokenizer(checkpoint.tokenizer_dir, folder, checkpoint.config.context_length, **more)
    with torch.device("meta"):
        empty = Clip(checkpoint.config).state_dict()
    weights = fitting(empty, finite(checkpoint.state_dict.items(), checkpoint.path))
    scale = checkpoint.logit_scale
    named = to_hf(weights, scale) if clip else to_siglip(weights, scale, checkpoint.logit_bias)
    stored = as_stored(named, DTYPES[dtype])
    if dtype != "fp32":  # a narrower range may not hold them
        stored = finite(stored, checkpoint.path)
    write_safetensors(stored, folder, most)
    write_json(folder / "config.json", hf_config(checkpoint.config, _bos_token_id(checkpoint.tokenizer_dir), dtype))
    write_json(folder / "preprocessor_config.json", hf_preprocessor(checkpoint.config))
    write_json(folder / TRAINING_DATA, {"train_shards": checkpoint.recipe.get("data", {}).get("train_shards")})
    (folder / "README.md").write_text(model_card(checkpoint, metrics, data), encoding="utf-8")


def as_stored(weights: Named, dtype: torch.dtype) -> Named:
    """In the dtype asked for, the logit scale and bias in float32: bf16 would move the factor by up to 1.6 %."""
    return ((name, tensor if name.startswith("logit_") else tensor.to(dtype)) for name, tensor in weights)


def hf_class(c: ClipConfig) -> str:
    """`CLIPModel`, or `SiglipModel` for a model of SigLIP's two towers. Raises UserError for a model that neither can express."""
    if options := [f"model.{name}" for name in TOWER_OPTIONS if getattr(c, name)]:
        raise UserError(
            f"{' and '.join(options)}: transformers' CLIPModel and SiglipModel have no such thing, so the model can't be expressed there. "
            "It can be evaluated and continued from its checkpoint"
        )
    if (c.vision_pool, c.text_pool) == ("attention", "last"):
        return "SiglipModel"
    if "attention" in c.vision_pool or c.text_pool == "last":
        raise UserError(
            f"model.vision_pool is {c.vision_pool} and model.text_pool {c.text_pool}: transformers' SiglipModel is attention with last, its "
            "CLIPModel class with end, and this model is neither. It can be evaluated and continued from its checkpoint"
        )
    if c.eot_token_id == 2:
        raise UserError(
            "this tokenizer's end token has id 2, which CLIPModel treats as a legacy marker and pools elsewhere; "
            "the model can't be expressed as a CLIPModel"
        )
    if c.vision_pool != "class":
        raise UserError(
            f"model.vision_pool is {c.vision_pool}: the model has no class token, and a CLIPModel always has one; it can't be "
            "expressed as a CLIPModel. It can be evaluated and continued from its checkpoint"
        )
    return "CLIPModel"


def hf_config(c: ClipConfig, bos_token_id: int | None, dtype: str = "fp32") -> dict[str, Any]:
    """config.json of a CLIPModel or SiglipModel. A fixed set of fields: nothing of a user's input can name code to run.

    Raises UserError as `hf_class`.
    """
    kind = hf_class(c)
    shared: dict[str, int | float | str] = {
        "hidden_act": HF_ACTIVATIONS[c.activation], "layer_norm_eps": c.layer_norm_eps, "attention_dropout": 0.0,
    }  # fmt: skip
    if kind == "CLIPModel":
        shared["projection_dim"] = c.embed_dim
    text: dict[str, int | float | str | None] = {
        "model_type": "clip_text_model", "vocab_size": c.vocab_size, "hidden_size": c.text_width,
        "intermediate_size": c.text_mlp_width, "num_hidden_layers": c.text_layers,
        "num_attention_heads": c.text_heads, "max_position_embeddings": c.context_length,
        # transformers pools at the first eos_token_id, except for the value 2, which means the largest id (its legacy).
        "eos_token_id": c.eot_token_id, "bos_token_id": bos_token_id, "pad_token_id": c.eot_token_id,
    }  # fmt: skip
    vision: dict[str, int | float | str] = {
        "model_type": "clip_vision_model", "hidden_size": c.vision_width, "intermediate_size": c.vision_mlp_width,
        "num_hidden_layers": c.vision_layers, "num_attention_heads": c.vision_heads, "num_channels": 3,
        "image_size": c.image_size, "patch_size": c.patch_size,
    }  # fmt: skip
    stored = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype]
    if kind == "SiglipModel":
        text |= {"model_type": "siglip_text_model", "projection_size": c.embed_dim}
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": True}
        towers = {"text_config": text | shared, "vision_config": vision | shared}
        return {"architectures": [kind], "model_type": "siglip", "initializer_factor": 1.0, **towers, "dtype": stored}
    return {
        "architectures": [kind],
        "model_type": "clip",
        "projection_dim": c.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": text | shared,
        "vision_config": vision | shared,
        "dtype": stored,
    }


def _bos_token_id(tokenizer_dir: Path) -> int | None:
    from transformers import AutoTokenizer

    bos: int | None = AutoTokenizer.from_pretrained(str(tokenizer_dir), trust_remote_code=False).bos_token_id
    return bos


def hf_preprocessor(c: ClipConfig) -> dict[str, Any]:
    """preprocessor_config.json: shorter side to image_size (bicubic), centre crop, normalise."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor" if c.text_pool == "end" else "SiglipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": c.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": c.image_size, "width": c.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(c.image_mean),
        "image_std": list(c.image_std),
    }


def write_safetensors(weights: Named, folder: Path, most_bytes: int) -> None:
    """The weights as model.safetensors, or as numbered files of at most `most_bytes` each with their index.

    One file's weights are in memory at a time.
    """
    written: list[list[str]] = []
    total = size = 0
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in pending.items()]
        write_one_file(folder / f"model-{len(written):05d}.tmp", shapes, pending.items())
        written.append(list(pending))
        pending.clear()

    for name, tensor in weights:
        if pending and size + tensor.nbytes > most_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    count = len(written)
    names = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    for i, name in enumerate(names):
        os.rename(folder / f"model-{i:05d}.tmp", folder / name)
    if count > 1:
        places = {weight: names[i] for i, held in enumerate(written) for weight in held}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
