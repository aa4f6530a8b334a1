"""Models: the presets, the two towers, and how chunks go through them."""

from dsclip.model.captions import Captions
from dsclip.model.clip import Clip, Encoder
from dsclip.model.config import ClipConfig
from dsclip.model.layer_major import Layer
from dsclip.model.presets import PRESETS, resolve_preset

__all__ = ["PRESETS", "Captions", "Clip", "ClipConfig", "Encoder", "Layer", "resolve_preset"]
