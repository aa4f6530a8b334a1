"""Models with fewer layers, for benches of files whose whole size a disk can't hold."""

from __future__ import annotations

from dataclasses import replace

from dsclip.errors import UserError
from dsclip.model import ClipConfig


def cut(config: ClipConfig, depth: float) -> ClipConfig:
    """The model with that share of both towers' layers, at least one of each. Raises UserError."""
    if not 0 < depth <= 1:
        raise UserError(f"--depth is {depth}; give a share of the layers, above 0 and at most 1")
    vision, text = (max(1, round(depth * layers)) for layers in (config.vision_layers, config.text_layers))
    return replace(config, vision_layers=vision, text_layers=text)
