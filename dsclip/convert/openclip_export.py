"""OpenCLIP folders, written: what `open_clip.create_model_and_transforms("local-dir:…")` and its tokenizer load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsclip.checkpoint import Checkpoint
from dsclip.convert.finite import finite
from dsclip.convert.folder import whole_folder, write_json
from dsclip.convert.hf import DTYPES, as_stored
from dsclip.convert.made_ahead import made_ahead
from dsclip.convert.openclip import CONFIG, WEIGHT_FILES
from dsclip.convert.safetensors_file import write_one_file
from dsclip.convert.streamed import empty_clip
from dsclip.convert.tokenizer_folder import write_tokenizer
from dsclip.convert.weights import fitting, register_to_class_token, to_openclip
from dsclip.errors import UserError
from dsclip.model import ClipConfig


def export_openclip(checkpoint: Checkpoint, out: Path, *, dtype: str = "fp32") -> None:
    """Writes the checkpoint as an OpenCLIP folder: safetensors, configuration, tokenizer.

    One tensor at a time is in memory. A sigmoid loss's bias goes along. Written aside and renamed, so `out` is whole or
    absent. Raises UserError when `out` exists with content, for weights that are not finite, and for a model without class
    token, which OpenCLIP's image towers always have; one register beside an average of patches is what it is there.
    """
    if "attention" in checkpoint.config.vision_pool or checkpoint.config.text_pool == "last":
        raise UserError(
            "OpenCLIP's SigLIP models have an image tower of timm, with other names; convert it to a SiglipModel (--to hf), which transformers loads"
        )
    if checkpoint.config.text_experts:
        raise UserError(
            f"model.text_experts is {checkpoint.config.text_experts}: OpenCLIP's text towers have one MLP in each block; the model can't be "
            "expressed there. It can be evaluated and continued from its checkpoint"
        )
    average, registers = checkpoint.config.vision_pool == "average", checkpoint.config.vision_registers
    if average and not registers:
        raise UserError(
            "model.vision_pool is average: the model has no class token, and OpenCLIP's image towers always have one; it can't be "
            "expressed there. With model.vision_registers=1, which is what its class token is beside an average, it could"
        )
    if registers != average:
        raise UserError(
            f"model.vision_registers is {registers}: OpenCLIP's image towers have no registers; it can't be expressed there"
        )
    out = Path(out)
    with whole_folder(out) as temporary:
        write_tokenizer(checkpoint.tokenizer_dir, temporary, checkpoint.config.context_length)
        scale, bias = checkpoint.logit_scale, checkpoint.logit_bias
        empty = empty_clip(checkpoint.config).state_dict()
        stored = DTYPES[dtype]
        in_openclip = register_to_class_token if average else lambda named: named
        shapes = (
            (n, x.shape, x.dtype) for n, x in as_stored(to_openclip(in_openclip(empty.items()), scale, bias), stored)
        )
        weights = fitting(empty, finite(checkpoint.state_dict.items(), checkpoint.path))
        named = as_stored(to_openclip(in_openclip(weights), scale, bias), stored)
        write_one_file(temporary / WEIGHT_FILES[0], shapes, made_ahead(finite(named, checkpoint.path)))
        write_json(temporary / CONFIG, openclip_config(checkpoint.config, bias, tokenizer=out.name))


def openclip_config(c: ClipConfig, logit_bias: float | None, tokenizer: str) -> dict[str, Any]:
    """open_clip_config.json. tokenizer: any name; for a local folder OpenCLIP takes the tokenizer in it."""
    norms = {} if c.layer_norm_eps == 1e-5 else {"norm_kwargs": {"eps": c.layer_norm_eps}}
    vision: dict[str, Any] = {
        "image_size": c.image_size, "patch_size": c.patch_size, "width": c.vision_width, "layers": c.vision_layers,
        "head_width": c.vision_width // c.vision_heads, "mlp_ratio": _ratio(c.vision_mlp_width, c.vision_width),
    }  # fmt: skip
    text: dict[str, Any] = {
        "context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.text_width, "heads": c.text_heads,
        "layers": c.text_layers, "mlp_ratio": _ratio(c.text_mlp_width, c.text_width), "hf_tokenizer_name": tokenizer,
    }  # fmt: skip
    if c.eot_token_id != c.vocab_size - 1 or c.vocab_size != 49408:  # OpenCLIP's default pools at the largest id
        text |= {"pool_type": "eos", "eos_id": c.eot_token_id}
    section: dict[str, Any]
    for section, scale, qk_norm in (
        (vision, c.vision_layer_scale, c.vision_qk_norm), (text, c.text_layer_scale, c.text_qk_norm),
    ):  # fmt: skip
        section |= ({} if scale is None else {"ls_init_value": scale}) | ({"qk_norm": True} if qk_norm else {})
    if c.vision_pool == "average":
        vision["pool_type"] = "avg"
    model: dict[str, Any] = {"embed_dim": c.embed_dim, "vision_cfg": vision | norms, "text_cfg": text | norms}
    if c.activation == "quick_gelu":
        model["quick_gelu"] = True
    if logit_bias is not None:
        model["init_logit_bias"] = logit_bias
    preprocessing = {
        "size": c.image_size, "mode": "RGB", "mean": list(c.image_mean), "std": list(c.image_std),
        "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip
    return {"model_cfg": model, "preprocess_cfg": preprocessing}


def _ratio(mlp_width: int, width: int) -> float:
    """OpenCLIP cuts width · ratio to an integer, which a quotient's last bit may take one too low."""
    ratio = mlp_width / width
    return ratio if int(width * ratio) == mlp_width else (mlp_width + 0.5) / width
