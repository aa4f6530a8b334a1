"""A model by name, with weights from wherever they come: what the Python API begins with."""

from __future__ import annotations

import warnings
from typing import Any

from dsclip.convert.init import fitted_weights, starting_config
from dsclip.convert.source import open_source
from dsclip.model import Clip


def create_model(preset: str, *, init: str | None = None, stretch: str = "linear", **overrides: Any) -> Clip:
    """A CLIP model by preset name, on the current default device (also `meta`).

    init: HF CLIP folder, OpenCLIP folder or state dict, dsclip checkpoint, or on the hub `hf:NAME` or `openclip:NAME`, to take
    the weights from. What shapes don't show (heads, activation, norms' epsilon, colours, end token) is taken from there too,
    and with the preset `auto` all the rest, unless an override says otherwise, which is refused but for the image size and
    the context length; stretch: how text positions fit a longer one, see `resize_text_positions`. A Python warning says what
    a bare state dict leaves open. overrides: any field of ClipConfig. Raises UserError for unknown names and for weights
    that don't fit.
    """
    model = Clip(starting_config(init, preset, **overrides))
    if init is not None:
        source = open_source(init)
        state_dict, _ = fitted_weights(source, model.config, stretch)
        for note in source.notes(model.config):
            warnings.warn(note, stacklevel=2)
        model.load_state_dict(state_dict)
    return model
