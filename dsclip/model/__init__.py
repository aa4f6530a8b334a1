"""Models: the presets, the two towers, and how chunks go through them."""

from dsclip.model.captions import Captions
from dsclip.model.clip import Clip, Encoder
from dsclip.model.config import PRESETS, ClipConfig, resolve_preset
from dsclip.model.layer_major import Layer

__all__ = ["PRESETS", "Captions", "Clip", "ClipConfig", "Encoder", "Layer", "resolve_preset"]
