"""Models without two copies of their weights in memory: built empty, filled one tensor at a time, run from disk where
they don't fit."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_max_memory, offload_weight, save_offload_index, set_module_tensor_to_device

from dsclip.convert.weights import Named, fitting
from dsclip.model import Clip, ClipConfig


def empty_clip(config: ClipConfig) -> Clip:
    """The model with weights that take no memory, on the meta device."""
    with init_empty_weights(include_buffers=True):
        return Clip(config)


def loaded_clip(config: ClipConfig, weights: Named, device: torch.device, dtype: torch.dtype) -> Clip:
    """The model for inference on one device. Raises UserError for weights that don't fit."""
    model = empty_clip(config)
    for name, tensor in fitting(model.state_dict(), weights):
        set_module_tensor_to_device(model, name, device, value=tensor, dtype=dtype, clear_cache=False)
    return model.eval().requires_grad_(False)


def spread_clip(
    config: ClipConfig, weights: Named, dtype: torch.dtype, offload_folder: Path, host_gb: float | None = None,
    *, gpus: bool = True,
) -> tuple[Clip, dict[str, str]]:  # fmt: skip
    """(the model for inference, where its parts are) over all GPUs, then host memory, then files in `offload_folder`, as far as it fits.

    What isn't on its device is fetched before a layer runs and dropped after it. host_gb: 10⁹ bytes of host memory that
    weights may take; None: what is free. gpus: whether they are used. Raises UserError for weights that don't fit.
    """
    model = empty_clip(config)
    memory = {place: size for place, size in get_max_memory().items() if gpus or place == "cpu"}
    if host_gb is not None:
        memory["cpu"] = int(host_gb * 1e9)
    whole = _layer_classes(model)
    device_map = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole, dtype=dtype)
    index: dict[str, dict[str, object]] = {}
    offload_folder.mkdir(parents=True, exist_ok=True)
    for name, tensor in fitting(model.state_dict(), weights):
        place = _place(name, device_map)
        if not tensor.is_floating_point():  # few numbers, which stay as they are, and which accelerate wouldn't fetch
            set_module_tensor_to_device(model, name, "cpu" if place == "disk" else place, value=tensor)
        elif place == "disk":
            set_module_tensor_to_device(model, name, "meta", dtype=dtype)
            offload_weight(tensor.to(dtype), name, offload_folder, index=index)
        else:
            set_module_tensor_to_device(model, name, place, value=tensor, dtype=dtype, clear_cache=False)
    save_offload_index(index, offload_folder)
    model.eval().requires_grad_(False)
    dispatch_model(model, device_map, offload_dir=offload_folder, preload_module_classes=whole)
    return model, {part: str(place) for part, place in device_map.items()}


def _layer_classes(model: Clip) -> list[str]:
    """Classes of the towers' layers: a layer uses its submodules' weights directly, so these come and go together."""
    towers = (model.visual, model.text)
    return sorted({type(layer).__name__ for t in towers for layer in (t.embed, *t.blocks, t.head)})


def _place(name: str, device_map: dict[str, int | str | torch.device]) -> int | str | torch.device:
    """Where the map puts a weight: at its module, or one that holds it."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map[name]
