"""InfoNCE between any two features of the same samples.

Two views of an image (Chen et al. 2020, SimCLR, but with negatives of the other view alone), two captions, or an image and
another caption; image-image and text-text together are CleanCLIP's objective (Bansal et al. 2023, eq. 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dsclip.config.objective_section import TermSection
from dsclip.errors import UserError
from dsclip.losses import Group, Negatives, Pairs, softmax
from dsclip.objectives.term import Features, TermGrads


@dataclass(frozen=True)
class Contrast:
    """−½·mean(log p_ii) − ½·mean(log q_ii) of softmax(s·A·Bᵀ) over its rows and columns, by the tiled loss of the pairs.

    duplicates: what samples with equal keys are to each other. positive: they share a row's target, which with classes for
    keys is L_out of Khosla et al. 2020, "Supervised Contrastive Learning", eq. 2, between two views. No other option of
    the loss of the pairs applies.
    """

    one: str
    other: str
    temperature: float | None
    duplicates: str

    def __call__(self, features: Features, *, group: Group) -> TermGrads:
        log_scale = features.log_scale
        if self.temperature is not None:
            log_scale = torch.full_like(log_scale, -math.log(self.temperature))
        pairs = Pairs(features[self.one], features[self.other], log_scale, keys=features.keys)
        grads = softmax(pairs, negatives=Negatives(duplicates=self.duplicates), group=group)
        shared = grads.d_log_scale if self.temperature is None else None
        return TermGrads(grads.loss, {self.one: grads.d_image, self.other: grads.d_text}, shared)


def contrast(settings: TermSection, negatives: Negatives) -> Contrast:
    """The term of these settings."""
    if len(settings.between) != 2:
        raise UserError(
            f"objective.terms: `contrast` is between {', '.join(settings.between)}; give two features, such as [image, image_2]"
        )
    one, other = settings.between
    return Contrast(one, other, settings.temperature, settings.duplicates or negatives.duplicates)
