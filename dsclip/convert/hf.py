"""HuggingFace folders: writes what `CLIPModel`, `CLIPProcessor` and the zero-shot pipeline load offline, and reads it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsclip.checkpoint import Checkpoint
from dsclip.convert.model_card import model_card
from dsclip.convert.weights import Named, from_hf, to_hf
from dsclip.errors import UserError
from dsclip.model import ClipConfig

TRAINING_DATA = "training_data.json"  # so that results on training pairs are known for what they are
MAX_SHARD_GB = 5.0  # of a weight file, as transformers had it for long
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_hf(
    checkpoint: Checkpoint,
    out: Path,
    *,
    dtype: str = "fp32",
    metrics: dict[str, dict[str, float]] | None = None,
    data: dict[str, str] | None = None,
    overwrite: bool = False,
    max_shard_gb: float = MAX_SHARD_GB,
) -> None:
    """Writes the checkpoint as a HuggingFace folder: safetensors, configuration, preprocessing, tokenizer, model card.

    metrics: {task: {metric: value}} and data: {task: what it was measured on} for the card. max_shard_gb: 10⁹ bytes of a
    weight file, of which one at a time is in memory. Written aside and renamed, so `out` is whole or absent. Raises
    UserError when `out` exists with content and `overwrite` is not set, and as `check_expressible`.
    """
    check_expressible(checkpoint.config)
    out = Path(out)
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another folder or remove it")
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint.tokenizer_dir, temporary)
    weights = to_hf(checkpoint.state_dict.items(), checkpoint.logit_scale)
    write_safetensors(
        ((name, tensor.to(DTYPES[dtype])) for name, tensor in weights), temporary, int(max_shard_gb * 1e9)
    )
    _write_json(temporary / "config.json", hf_config(checkpoint.config, _bos_token_id(checkpoint.tokenizer_dir), dtype))
    _write_json(temporary / "preprocessor_config.json", hf_preprocessor(checkpoint.config))
    _write_json(temporary / TRAINING_DATA, {"train_shards": checkpoint.recipe.get("data", {}).get("train_shards")})
    (temporary / "README.md").write_text(model_card(checkpoint, metrics or {}, data or {}), encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    os.rename(temporary, out)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_expressible(c: ClipConfig) -> None:
    """Raises UserError for a model that CLIPModel can't express."""
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


def hf_config(c: ClipConfig, bos_token_id: int | None, dtype: str = "fp32") -> dict[str, Any]:
    """CLIPModel's config.json. A fixed set of fields: nothing of a user's input can name code to run.

    Raises UserError as `check_expressible`.
    """
    check_expressible(c)
    shared: dict[str, int | float | str] = {
        "projection_dim": c.embed_dim, "hidden_act": c.activation, "layer_norm_eps": c.layer_norm_eps,
        "attention_dropout": 0.0,
    }  # fmt: skip
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
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": c.embed_dim,
        "logit_scale_init_value": 2.6592,
        "text_config": text | shared,
        "vision_config": vision | shared,
        "dtype": {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[dtype],
    }


def _bos_token_id(tokenizer_dir: Path) -> int | None:
    from transformers import AutoTokenizer

    bos: int | None = AutoTokenizer.from_pretrained(str(tokenizer_dir), trust_remote_code=False).bos_token_id
    return bos


def hf_preprocessor(c: ClipConfig) -> dict[str, Any]:
    """preprocessor_config.json: shorter side to image_size (bicubic), centre crop, normalise."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
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


def training_data(path: Path) -> str | list[str] | None:
    """The training shards of a folder that dsclip wrote; None for others."""
    shards = _read_json(path / TRAINING_DATA).get("train_shards") if (path / TRAINING_DATA).is_file() else None
    return shards if isinstance(shards, str | list) else None


@dataclass(frozen=True)
class HfFolder:
    """A CLIPModel folder whose weights are still on the disk. scale: the logit scale as a factor."""

    path: Path
    config: ClipConfig
    scale: float
    files: list[Path]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each weight by dsclip's name, in the stored dtype, when it is asked for. Raises UserError for damaged files."""
        return from_hf(_stored(self.files))


def open_hf_folder(path: Path) -> HfFolder:
    """Reads the configuration of a CLIPModel folder and looks for its safetensors.

    Raises UserError for folders that hold another kind of model.
    """
    path = Path(path)
    config = _read_json(path / "config.json")
    if config.get("model_type") != "clip":
        raise UserError(
            f"{path} holds a {config.get('model_type')!r} model; only CLIPModel folders (model_type clip) are read"
        )
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path} has no model.safetensors; pickled weights (.bin) are not read, convert them first")
    scale = next((tensor for name, tensor in _stored(files, only="logit_scale")), None)
    if scale is None:
        raise UserError(f"{path} has no logit_scale: it is no whole CLIPModel")
    return HfFolder(path, _config_from_hf(config, path), math.exp(float(scale)), files)


def load_hf_folder(path: Path) -> tuple[ClipConfig, dict[str, Tensor], float]:
    """(configuration, float32 weights by dsclip's names, logit scale) of a CLIPModel folder. Raises as `open_hf_folder`."""
    folder = open_hf_folder(path)
    return folder.config, {name: tensor.float() for name, tensor in folder.weights()}, folder.scale


def _stored(files: list[Path], only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of safetensors files, one after the other, or those of one name."""
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, it is no dictionary
                    if only in (None, name):
                        yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error})") from error


def write_safetensors(weights: Named, folder: Path, most_bytes: int) -> None:
    """The weights as model.safetensors, or as numbered files of at most `most_bytes` each with their index.

    One file's weights are in memory at a time.
    """
    written: list[list[str]] = []
    total = size = 0
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / f"model-{len(written):05d}.tmp", metadata={"format": "pt"})
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
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _config_from_hf(config: dict[str, Any], path: Path) -> ClipConfig:
    from transformers import CLIPConfig

    # transformers fills in the many defaults that published configurations leave out.
    full = CLIPConfig.from_dict(
        {k: config[k] for k in ("text_config", "vision_config", "projection_dim") if k in config}
    )
    text, vision = full.text_config, full.vision_config
    if text.hidden_act != vision.hidden_act or text.layer_norm_eps != vision.layer_norm_eps:
        raise UserError(f"{path}: the towers differ in activation or layer_norm_eps, which dsclip's can't")
    normalisation: dict[str, Any] = {}  # the fields of ClipConfig of these names
    if (path / "preprocessor_config.json").is_file():
        preprocessor = _read_json(path / "preprocessor_config.json")
        normalisation = {k: tuple(preprocessor[k]) for k in ("image_mean", "image_std") if k in preprocessor}
    # Published OpenAI folders say eos_token_id 2 and mean the largest id of the vocabulary.
    eot = text.vocab_size - 1 if text.eos_token_id in (2, None) else text.eos_token_id
    return ClipConfig(
        embed_dim=full.projection_dim, image_size=vision.image_size, patch_size=vision.patch_size,
        vision_width=vision.hidden_size, vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads, vision_mlp_width=vision.intermediate_size,
        text_width=text.hidden_size, text_layers=text.num_hidden_layers, text_heads=text.num_attention_heads,
        text_mlp_width=text.intermediate_size, context_length=text.max_position_embeddings,
        vocab_size=text.vocab_size, eot_token_id=eot, activation=vision.hidden_act,
        layer_norm_eps=vision.layer_norm_eps, **normalisation,
    )  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} has no {path.name}: it is no HuggingFace model folder") from error
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content
