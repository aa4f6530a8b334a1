"""A model by name, with weights from wherever they come: what the Python API begins with."""

from __future__ import annotations

from typing import Any

from dsclip.convert.init import load_init
from dsclip.model import Clip, resolve_preset


def create_model(preset: str, *, init: str | None = None, **overrides: Any) -> Clip:
    """A CLIP model by preset name, on the current default device (also `meta`).

    init: HF CLIP folder, OpenCLIP state dict or dsclip checkpoint to take the weights from.
    overrides: any field of ClipConfig. Raises UserError for unknown names and for weights that don't fit.
    """
    model = Clip(resolve_preset(preset, **overrides))
    if init is not None:
        state_dict, _ = load_init(init, model.config)
        model.load_state_dict(state_dict)
    return model
