"""Random inputs on which a converted model is compared with its original."""

from __future__ import annotations

import torch
from torch import Tensor

from dsclip.model import ClipConfig


def probe_inputs(config: ClipConfig, vocabulary: int, samples: int) -> tuple[Tensor, Tensor]:
    """Images [n, 3, S, S] and captions [n, L] of ids below `vocabulary`, each with its end token at another place; always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, config.image_size, config.image_size, generator=generator)
    tokens = torch.randint(0, vocabulary, (samples, config.context_length), generator=generator)
    tokens[tokens == config.eot_token_id] = 0
    places = torch.arange(samples) % (config.context_length - 1) + 1
    tokens[torch.arange(samples), places] = config.eot_token_id
    return images, tokens
