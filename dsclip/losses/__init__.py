"""Losses: pure functions from features to the loss of the global batch and its exact feature gradients.

Read `info_nce.py` first, the loss of CLIP on half a page, dense; then `tiled.py`, the same in tiles and over ranks; then
`cross_entropy.py`, what InfoNCE does within a tile. The other files are what those take: `similarity.py` and
`late_interaction.py`, `siglip.py`, `masks.py` (positives and what is left out), `products.py` (how tiles are multiplied),
`debiased.py`, `gathering.py` and `blocks.py` (samples of other ranks, at once or in a ring). Around whole losses:
`matryoshka.py`.

Shapes, as suffixes of names (`image_ND`, `logits_rc`) and in docstrings:

    N  pairs of the global batch    n  pairs of this rank               D  width of a feature
    r  rows of a tile               c  columns of a tile                T  tokens of a sample, in token-wise losses
    m  hard negatives of this rank  Q  pairs in the queue               [] a scalar

In a tile one dimension holds queries and the other their candidates: `candidate_dim` is 1 where rows are the queries, 0
where columns are. Extra columns, hard negatives and the queue, are candidates and never queries.
"""

from dsclip.losses.dense import check_options, from_dense
from dsclip.losses.group import Group, SingleRank
from dsclip.losses.info_nce import dense_info_nce, softmax
from dsclip.losses.late_interaction import filip
from dsclip.losses.matryoshka import with_prefixes
from dsclip.losses.pairs import Loss, LossGrads, Negatives, Pairs
from dsclip.losses.registry import RegisteredLoss, checked, find_loss, register
from dsclip.losses.siglip import sigmoid

__all__ = [
    "Group", "Loss", "LossGrads", "Negatives", "Pairs", "RegisteredLoss", "SingleRank", "check_options", "checked",
    "dense_info_nce", "filip", "find_loss", "from_dense", "register", "sigmoid", "softmax", "with_prefixes",
]  # fmt: skip
