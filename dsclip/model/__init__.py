"""Models: the presets, the two towers, and how chunks go through them."""

from dsclip.model.clip import Clip
from dsclip.model.config import PRESETS, ClipConfig, resolve_preset
from dsclip.model.layer_major import Stage

__all__ = ["PRESETS", "Clip", "ClipConfig", "Stage", "create_model", "resolve_preset"]


def create_model(preset: str, *, init: str | None = None, **overrides) -> Clip:
    """A CLIP model by preset name, on the current default device (also `meta`).

    init: HF CLIP folder, OpenCLIP state dict or dsclip checkpoint to take the weights from.
    overrides: any field of ClipConfig. Raises UserError for unknown names and for weights that don't fit.
    """
    model = Clip(resolve_preset(preset, **overrides))
    if init is not None:
        from dsclip.convert.init import load_init  # convert comes last in the pipeline and imports this package

        state_dict, _ = load_init(init, model.config)
        model.load_state_dict(state_dict)
    return model
