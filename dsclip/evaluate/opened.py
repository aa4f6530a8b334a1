"""The model that is evaluated: a checkpoint, a folder, a file, or another framework's through three functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dsclip.command_line import say
from dsclip.convert.source import open_source
from dsclip.convert.streamed import loaded_clip, spread_clip
from dsclip.convert.whole import check_tokenizer, tokenizer_of
from dsclip.distributed import Collectives
from dsclip.errors import UserError
from dsclip.evaluate.adapter import ADAPTER, load_adapter
from dsclip.evaluate.features import Embedder
from dsclip.evaluate.results.protocol import precision, run_protocol, versions
from dsclip.model import Clip, ClipConfig
from dsclip.model.captions import cut_captions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_CHUNK = 32  # images: half the activations of a batch of 64, as fast, and the same bits


@dataclass(frozen=True)
class Wanted:
    """What a user says of the model. dtype: of DTYPES, None: bf16 on a GPU, fp32 on a CPU; the rest: see the command line.

    average: the moving average of a checkpoint's weights.
    """

    model: str
    tokenizer: str | None = None
    batch_size: int = 64
    dtype: str | None = None
    device_map: str | None = None
    host_memory_gb: float | None = None
    offload_folder: Path | None = None
    average: bool = False


@dataclass(frozen=True)
class OpenedModel:
    """prepare: what becomes of a decoded picture, None: dsclip's preprocessing for image_size. protocol: see `run_protocol`.

    train_shards: what it was trained on, where that is known. logit_scale: as a factor, None where the model doesn't say.
    """

    name: str
    embedder: Embedder
    image_size: int
    prepare: Callable[[Image.Image], Tensor] | None
    protocol: Callable[[], dict[str, Any]]
    train_shards: str | list[str] | None
    logit_scale: float | None = None


def open_model(wanted: Wanted, device: torch.device, group: Collectives, temporary: Path) -> OpenedModel:
    """Loads it onto the device, or several. temporary: for weights that fit nowhere else. Raises UserError."""
    if wanted.batch_size < 1:
        raise UserError(f"--batch-size is {wanted.batch_size}; it must be at least 1")
    if wanted.device_map is not None and group.world_size > 1:
        raise UserError("--device-map spreads the model over all devices from one process; start it without torchrun")
    of_map = {"--host-memory-gb": wanted.host_memory_gb, "--offload-folder": wanted.offload_folder}
    if wanted.device_map is None and (unused := [name for name, value in of_map.items() if value is not None]):
        raise UserError(
            f"{' and '.join(unused)} says something to --device-map auto alone; give that too, or leave it out"
        )
    dtype = DTYPES[wanted.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    if wanted.model.startswith(ADAPTER):
        return _adapted(wanted, device, group)
    return _loaded(wanted, dtype, device, group, temporary)


def _loaded(
    wanted: Wanted, dtype: torch.dtype, device: torch.device, group: Collectives, temporary: Path
) -> OpenedModel:
    source = open_source(wanted.model, average=wanted.average)
    tokenizer = tokenizer_of(source, wanted.tokenizer)
    config = source.config(tokenizer.eot_token_id)
    check_tokenizer(tokenizer, config, source)
    for note in source.notes(config) if group.rank == 0 else ():
        say(note)
    if wanted.device_map is None:
        model = loaded_clip(config, source.weights(), device, dtype)
    else:
        folder = wanted.offload_folder or temporary
        model, parts = spread_clip(config, source.weights(), dtype, folder, wanted.host_memory_gb)
        places = Counter(parts.values())
        say("parts of the model: " + ", ".join(f"{n} on {place}" for place, n in places.items()))
    encode_image, encode_text = _encoders(model, config, device)
    embedder = Embedder(encode_image, encode_text, tokenizer, group, config.context_length, wanted.batch_size)
    name = wanted.tokenizer or str(source.tokenizer_dir)

    @cache  # it hashes all weights
    def protocol() -> dict[str, Any]:
        path = f"{source.path}{' (its moving average)' * wanted.average}"
        return run_protocol(model, path, config, tokenizer, name, dtype, device, source.stored)

    return OpenedModel(wanted.model, embedder, config.image_size, None, protocol, source.train_shards, source.scale)


def _encoders(
    model: Clip, config: ClipConfig, device: torch.device
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    chunk_size = CPU_CHUNK if device.type == "cpu" else None

    def encode_image(images: Tensor) -> Tensor:
        features: Tensor = model(images.to(device), None, chunk_size=chunk_size)[0]
        return features

    def encode_text(tokens: Tensor) -> Tensor:
        features: Tensor = model(None, cut_captions(tokens, config, None, device))[1]
        return features

    return encode_image, encode_text


def _adapted(wanted: Wanted, device: torch.device, group: Collectives) -> OpenedModel:
    given = {
        "--tokenizer": wanted.tokenizer, "--dtype": wanted.dtype, "--device-map": wanted.device_map, "--ema": wanted.average or None,
    }  # fmt: skip
    if unused := [name for name, value in given.items() if value is not None]:
        raise UserError(f"{' and '.join(unused)} can't be obeyed with an adapter: that is up to its functions")
    adapter, code = load_adapter(wanted.model)
    embedder = Embedder(
        adapter.image_features, adapter.text_features, lambda texts, _: texts, group, 0, wanted.batch_size
    )

    def protocol() -> dict[str, Any]:
        own = {"by": wanted.model, "adapter_sha256": code}
        return {
            "model": {"path": wanted.model, "weights_sha256": None, "adapter_sha256": code}, "image": own, "text": own,
            "precision": precision(torch.float32, device) | {"dtype": "the adapter's"}, "versions": versions(),
        }  # fmt: skip

    return OpenedModel(wanted.model, embedder, adapter.blank_size, adapter.prepared, protocol, None)
