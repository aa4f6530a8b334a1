"""What a loss is given and what it returns: this rank's pairs, the negatives asked for, exact gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dsclip.errors import UserError
from dsclip.losses.group import ALONE, Group

DUPLICATES = ("negative", "positive", "mask")
HARD_SCOPES = ("global", "own")


@dataclass(frozen=True)
class Negatives:
    """Which entries of the similarity matrix count against a pair, and how much.

    duplicates: what other samples with an equal key are: `negative` (nothing special), `positive` (the target is spread
    over them evenly) or `mask` (left out). hard: hard-negative captions compete for every image of the global batch
    (`global`) or for their own image only (`own`). filter_margin δ: an entry with I_i·T_j > I_i·T_i − δ is taken for a
    false negative and left out. beta: negatives weigh exp(β·S_ij), scaled to mean 1 over a row and held constant
    (Robinson et al. 2021); 0 is plain InfoNCE. label_smoothing ε: share of the target spread over all candidates.
    debiased τ⁺: the share of drawn negatives that are positives nobody marked, taken out of the softmax by an estimate
    (Chuang et al. 2020, see `debiased`); 0: none.
    """

    duplicates: str = "negative"
    hard: str = "global"
    filter_margin: float | None = None
    beta: float = 0.0
    label_smoothing: float = 0.0
    debiased: float = 0.0

    def __post_init__(self) -> None:
        if self.duplicates not in DUPLICATES:
            raise UserError(f"duplicates is `{self.duplicates}`; choose {', '.join(DUPLICATES)}")
        if self.hard not in HARD_SCOPES:
            raise UserError(f"the scope of hard negatives is `{self.hard}`; choose {', '.join(HARD_SCOPES)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it is a share: 0 ≤ share < 1")
        if not 0 <= self.debiased < 1:
            raise UserError(f"debiased is {self.debiased}; it is a share: 0 ≤ share < 1")
        if self.beta < 0:
            raise UserError(f"beta is {self.beta}; it weighs harder negatives more and can't be negative")

    @property
    def one_hot(self) -> bool:
        """Whether the target is a query's partner alone and all other candidates weigh the same."""
        return not (self.beta or self.label_smoothing or self.debiased) and self.duplicates != "positive"


@dataclass(frozen=True)
class Pairs:
    """The features of this rank's n pairs, and all that a loss may need beside them.

    image, text [n, D]: unit rows, float32 or float64, or bfloat16, which is gathered as such and computed in float32;
    with token-wise losses [n, T, D] and `*_valid` [n, T] bool, True where a token exists. log_scale, bias []: log s and SigLIP's logit bias. keys [n] int64: equal keys mark
    duplicates. classes [n] int64: of each sample; no loss of pairs uses it, terms of the objective do. hard_text [m, D] (or [m, T, D]): hard-negative captions, m may differ between ranks; hard_owner [m]: the
    row of this rank that each belongs to. queue_image, queue_text [Q, D], queue_keys [Q]: features of earlier steps,
    the same on every rank, negatives only; with token-wise losses queue_text_valid [Q, T] bool, all images have all tokens.
    """

    image: Tensor
    text: Tensor
    log_scale: Tensor
    bias: Tensor | None = None
    image_valid: Tensor | None = None
    text_valid: Tensor | None = None
    keys: Tensor | None = None
    hard_text: Tensor | None = None
    hard_valid: Tensor | None = None
    hard_owner: Tensor | None = None
    queue_image: Tensor | None = None
    queue_text: Tensor | None = None
    queue_keys: Tensor | None = None
    queue_text_valid: Tensor | None = None
    classes: Tensor | None = None


@dataclass(frozen=True)
class LossGrads:
    """A loss and its exact gradients.

    loss []: the value over the global batch, in nats, the same on every rank. d_image, d_text, d_hard_text: gradient
    of the *global* loss for this rank's features, in their shapes. d_log_scale, d_bias []: already summed over ranks.
    correct_image, correct_text []: how many of this rank's images (captions) have no caption (image) in the global
    batch that is more similar than their partner. masked []: entries that this rank left out.
    """

    loss: Tensor
    d_image: Tensor
    d_text: Tensor
    d_log_scale: Tensor
    correct_image: Tensor
    correct_text: Tensor
    d_bias: Tensor | None = None
    d_hard_text: Tensor | None = None
    masked: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))


PLAIN = Negatives()


class Loss(Protocol):
    """A loss as the engine calls it. Collective."""

    def __call__(
        self, pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
    ) -> LossGrads:
        """The loss of the global batch and its exact gradients. tile_entries: see `tiled_loss`."""
