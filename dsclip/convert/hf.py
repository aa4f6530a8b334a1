"""HuggingFace folders, written: what `CLIPModel` or `SiglipModel`, a processor and the zero-shot pipeline load offline."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dsclip.checkpoint import Checkpoint
from dsclip.convert.finite import finite
from dsclip.convert.folder import whole_folder, write_json
from dsclip.convert.made_ahead import made_ahead
from dsclip.convert.model_card import Metrics, model_card
from dsclip.convert.safetensors_file import Shape, write_one_file
from dsclip.convert.tokenizer_folder import write_tokenizer
from dsclip.convert.weights import Named, fitting, to_hf, to_siglip
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig
from dsclip.model.config import TOWER_OPTIONS

TRAINING_DATA = "training_data.json"  # so that results on training pairs are known for what they are
ONE_FILE = "model.safetensors"
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
    weight file; two weights are in memory at a time. Written aside and renamed, so `out` is whole or absent. Raises
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

    def stored(weights: Named) -> Named:
        scale, bias = checkpoint.logit_scale, checkpoint.logit_bias
        return as_stored(to_hf(weights, scale) if clip else to_siglip(weights, scale, bias), DTYPES[dtype])

    # In the model's order, whatever that of a checkpoint's optimizer is: so each file is written from its start to its end.
    held = checkpoint.state_dict
    names = [*(name for name in empty if name in held), *(name for name in held if name not in empty)]
    weights = stored(fitting(empty, finite(((name, held[name]) for name in names), checkpoint.path)))
    if dtype != "fp32":  # a narrower range may not hold them
        weights = finite(weights, checkpoint.path)
    shapes = ((name, weight.shape, weight.dtype) for name, weight in stored(empty.items()))
    write_safetensors(shapes, weights, folder, most)
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


def is_convertible(c: ClipConfig) -> bool:
    """Whether `hf_class` knows a class for it."""
    try:
        hf_class(c)
    except UserError:
        return False
    return True


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


def write_safetensors(shapes: Iterable[Shape], weights: Named, folder: Path, most_bytes: int) -> None:
    """The weights, which come in the order of `shapes`, as model.safetensors, or as numbered files of at most `most_bytes` with their index.

    Two weights are in memory at a time. Raises ValueError as `write_one_file`.
    """
    files = _files_of(shapes, most_bytes)
    count, coming = len(files), made_ahead(weights)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [ONE_FILE]
    for name, held in zip(names, files, strict=True):
        write_one_file(folder / name, held, itertools.islice(coming, len(held)))
    if (more := next(coming, None)) is not None:
        raise ValueError(f"{more[0]} came, which wasn't said to")
    if count > 1:
        places = {weight: name for name, held in zip(names, files, strict=True) for weight, _, _ in held}
        total = sum(_bytes(shape) for held in files for shape in held)
        write_json(folder / f"{ONE_FILE}.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _files_of(shapes: Iterable[Shape], most_bytes: int) -> list[list[Shape]]:
    """What each file holds; a weight that is larger has one of its own."""
    files: list[list[Shape]] = [[]]
    size = 0
    for shape in shapes:
        if files[-1] and size + _bytes(shape) > most_bytes:
            files.append([])
            size = 0
        files[-1].append(shape)
        size += _bytes(shape)
    return files


def _bytes(shape: Shape) -> int:
    return shape[1].numel() * shape[2].itemsize
