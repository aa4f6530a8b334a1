"""Names and shapes of the same weights in dsclip, HuggingFace's CLIPModel and SiglipModel, and OpenCLIP. Pure maps, no arithmetic.

dsclip keeps query, key and value in one matrix (rows q, k, v) and projections as [embed_dim, width].
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from dsclip.errors import UserError

Named = Iterable[tuple[str, Tensor]]  # weights by name, each made when it is asked for

# Our name -> HuggingFace's, for what is not inside a block. {t} is text_model or vision_model.
_HF_OUTSIDE = {
    "visual.embed.patch_embedding.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.embed.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.embed.position_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.embed.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # HuggingFace's own spelling
    "visual.embed.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.head.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.head.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.head.projection.weight": "visual_projection.weight",
    "text.embed.token_embedding": "text_model.embeddings.token_embedding.weight",
    "text.embed.position_embedding": "text_model.embeddings.position_embedding.weight",
    "text.head.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.head.ln_final.bias": "text_model.final_layer_norm.bias",
    "text.head.projection.weight": "text_projection.weight",
}
# Where SiglipModel has other names or other weights.
_SIGLIP = {
    "visual.embed.patch_embedding.bias": "vision_model.embeddings.patch_embedding.bias",
    "visual.head.pool.query_embedding": "vision_model.head.probe",
    "visual.head.pool.qkv.weight": "vision_model.head.attention.in_proj_weight",
    "visual.head.pool.qkv.bias": "vision_model.head.attention.in_proj_bias",
    "visual.head.pool.out.weight": "vision_model.head.attention.out_proj.weight",
    "visual.head.pool.out.bias": "vision_model.head.attention.out_proj.bias",
    "visual.head.pool.ln.weight": "vision_model.head.layernorm.weight",
    "visual.head.pool.ln.bias": "vision_model.head.layernorm.bias",
    "visual.head.pool.mlp.fc1.weight": "vision_model.head.mlp.fc1.weight",
    "visual.head.pool.mlp.fc1.bias": "vision_model.head.mlp.fc1.bias",
    "visual.head.pool.mlp.fc2.weight": "vision_model.head.mlp.fc2.weight",
    "visual.head.pool.mlp.fc2.bias": "vision_model.head.mlp.fc2.bias",
    "text.head.projection.weight": "text_model.head.weight",
    "text.head.projection.bias": "text_model.head.bias",
}
_HF_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HF_TOWER = {"visual": "vision_model", "text": "text_model"}
_BLOCK = re.compile(r"(visual|text)\.blocks\.(\d+)\.(.+)\.(weight|bias)")
_OWN_BLOCK = re.compile(r"(visual|text)\.blocks\.(\d+)\.(.+)")
_HF_BLOCK_NAME = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")

_OPENCLIP_OUTSIDE = {
    "visual.conv1.weight": "visual.embed.patch_embedding.weight",
    "visual.class_embedding": "visual.embed.class_embedding",
    "visual.positional_embedding": "visual.embed.position_embedding",
    "visual.ln_pre.weight": "visual.embed.ln_pre.weight",
    "visual.ln_pre.bias": "visual.embed.ln_pre.bias",
    "visual.ln_post.weight": "visual.head.ln_post.weight",
    "visual.ln_post.bias": "visual.head.ln_post.bias",
    "token_embedding.weight": "text.embed.token_embedding",
    "positional_embedding": "text.embed.position_embedding",
    "ln_final.weight": "text.head.ln_final.weight",
    "ln_final.bias": "text.head.ln_final.bias",
}
_POSITIONS = "visual.embed.position_embedding"
_OPENCLIP_TRANSPOSED = {
    "visual.proj": "visual.head.projection.weight",
    "text_projection": "text.head.projection.weight",
}
_OPENCLIP_BLOCK = {
    "ln_1.weight": "ln_1.weight", "ln_1.bias": "ln_1.bias", "ln_2.weight": "ln_2.weight", "ln_2.bias": "ln_2.bias",
    "attn.in_proj_weight": "attn.qkv.weight", "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.out.weight", "attn.out_proj.bias": "attn.out.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight", "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight", "mlp.c_proj.bias": "mlp.fc2.bias",
    "ls_1.gamma": "attn.out.gamma", "ls_2.gamma": "mlp.fc2.gamma", "attn.ln_q.weight": "attn.ln_q.weight",
    "attn.ln_q.bias": "attn.ln_q.bias", "attn.ln_k.weight": "attn.ln_k.weight", "attn.ln_k.bias": "attn.ln_k.bias",
}  # fmt: skip
_OPENCLIP_BLOCK_NAME = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def to_hf(weights: Named, logit_scale: float) -> Iterator[tuple[str, Tensor]]:
    """dsclip's weights under CLIPModel's names, as they come; logit_scale is the factor, stored as its logarithm."""
    yield "logit_scale", torch.tensor(math.log(logit_scale))
    yield from _in_hf(weights, _HF_OUTSIDE)


def to_siglip(weights: Named, logit_scale: float, logit_bias: float | None) -> Iterator[tuple[str, Tensor]]:
    """dsclip's weights under SiglipModel's names, as they come; a model without a bias has that of zero."""
    yield "logit_scale", torch.tensor([math.log(logit_scale)])
    yield "logit_bias", torch.tensor([logit_bias or 0.0])
    yield from _in_hf(weights, _HF_OUTSIDE | _SIGLIP)


def _in_hf(weights: Named, outside: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if name in outside:
            yield outside[name], tensor
            continue
        match = _BLOCK.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no weight of a CLIP tower")
        tower, index, part, kind = match.groups()
        prefix = f"{_HF_TOWER[tower]}.encoder.layers.{index}."
        if part == "attn.qkv":
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{prefix}self_attn.{letter}_proj.{kind}", piece.contiguous()
        else:
            yield f"{prefix}{_HF_BLOCK[part]}.{kind}", tensor


def parts_in_hf(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of CLIPModel's or SiglipModel's weights that make each of dsclip's, one below the other; of logits none.

    Unknown names are kept as they are, and of a model that lacks a part the others: their shape will tell.
    """
    outside = {theirs: ours for table in (_HF_OUTSIDE, _SIGLIP) for ours, theirs in table.items()}
    block = {theirs: ours for ours, theirs in _HF_BLOCK.items()}
    tower = {theirs: ours for ours, theirs in _HF_TOWER.items()}
    parts: dict[str, list[str]] = {}
    for name in sorted(names):
        if name in ("logit_scale", "logit_bias") or name.endswith("embeddings.position_ids"):  # a buffer of old exports
            continue
        match = _HF_BLOCK_NAME.fullmatch(name)
        if not match:
            parts[outside.get(name, name)] = [name]
            continue
        prefix = f"{tower[match[1]]}.blocks.{match[2]}."
        if re.fullmatch(r"self_attn\.[qkv]_proj", match[3]):
            parts.setdefault(f"{prefix}attn.qkv.{match[4]}", []).append(name)
        else:
            parts[f"{prefix}{block.get(match[3], match[3])}.{match[4]}"] = [name]
    for ours, theirs in parts.items():
        if ".attn.qkv." in ours:
            theirs.sort(key=lambda name: "qkv".index(name.rpartition("_proj.")[0][-1]))
    return parts


def to_openclip(weights: Named, logit_scale: float, logit_bias: float | None) -> Iterator[tuple[str, Tensor]]:
    """dsclip's weights under OpenCLIP's names, as they come; logit_scale is the factor, stored as its logarithm."""
    yield "logit_scale", torch.tensor(math.log(logit_scale))
    if logit_bias is not None:
        yield "logit_bias", torch.tensor(logit_bias)
    outside = {ours: theirs for theirs, ours in _OPENCLIP_OUTSIDE.items()}
    transposed = {ours: theirs for theirs, ours in _OPENCLIP_TRANSPOSED.items()}
    block = {ours: theirs for theirs, ours in _OPENCLIP_BLOCK.items()}
    prefix = {"visual": "visual.transformer.resblocks", "text": "transformer.resblocks"}
    for name, tensor in weights:
        if name in outside:
            yield outside[name], tensor
        elif name in transposed:
            yield transposed[name], tensor.T.contiguous()
        elif (match := _OWN_BLOCK.fullmatch(name)) and match[3] in block:
            yield f"{prefix[match[1]]}.{match[2]}.{block[match[3]]}", tensor
        else:
            raise ValueError(f"{name} is no weight of a CLIP tower")


def from_openclip(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], float, float | None]:
    """(dsclip's weights, logit scale as a factor, a sigmoid loss's bias) from an OpenCLIP state dict.

    Unknown names are kept as they are.
    """
    renamed: dict[str, Tensor] = {}
    scale, bias = 1 / 0.07, None
    for full_name, tensor in weights.items():
        name = full_name.removeprefix("module.").removeprefix("text.")  # DDP's and CustomTextCLIP's prefixes
        if name == "logit_scale":
            scale = math.exp(float(tensor))
        elif name == "logit_bias":
            bias = float(tensor)
        elif name == "attn_mask" or name.endswith(".attn_mask"):
            continue  # the causal mask, a buffer
        elif name in _OPENCLIP_OUTSIDE:
            renamed[_OPENCLIP_OUTSIDE[name]] = tensor
        elif name in _OPENCLIP_TRANSPOSED:
            renamed[_OPENCLIP_TRANSPOSED[name]] = tensor.T.contiguous()
        elif match := _OPENCLIP_BLOCK_NAME.fullmatch(name):
            tower = "visual" if match[1] else "text"
            renamed[f"{tower}.blocks.{match[2]}.{_OPENCLIP_BLOCK.get(match[3], match[3])}"] = tensor
        else:
            renamed[full_name] = tensor
    return renamed, scale, bias


def class_token_to_register(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """dsclip's weights of an OpenCLIP tower that averages its patches: its class token, which nobody reads, is a register there.

    A class token's embedding and position are only ever used as their sum.
    """
    found = dict(weights)
    positions = found[_POSITIONS]
    found["visual.embed.registers"] = (found.pop("visual.embed.class_embedding") + positions[0])[None]
    found[_POSITIONS] = positions[1:]
    return found


def register_to_class_token(weights: Named) -> Named:
    """The other way round, as they come; the class token's position is zero."""
    for name, tensor in weights:
        if name == "visual.embed.registers":
            yield "visual.embed.class_embedding", tensor[0]
        elif name == _POSITIONS:
            yield name, torch.cat([torch.zeros_like(tensor[:1]), tensor])
        else:
            yield name, tensor


def fitting(state_dict: Mapping[str, Tensor], weights: Named) -> Named:
    """The weights, each of a name and shape that the model's have; raises UserError at the first other, and for missing ones.

    Where the model has integers they are such again: checkpoints hold everything in float32, and averages are none.
    """
    expected = {name: tensor.shape for name, tensor in state_dict.items()}
    integers = {name: tensor.dtype for name, tensor in state_dict.items() if not tensor.dtype.is_floating_point}
    for name, tensor in weights:
        shape = expected.pop(name, None)
        if shape is None:
            raise UserError(f"the weights hold {name}, which this model hasn't")
        if shape != tensor.shape:
            raise UserError(f"{name} has the shape {list(tensor.shape)}, and this model's has {list(shape)}")
        yield name, tensor.round().to(integers[name]) if name in integers else tensor
    if expected:
        names = sorted(expected)
        raise UserError(f"the weights lack {', '.join(names[:4])}" + (", …" if len(names) > 4 else ""))
