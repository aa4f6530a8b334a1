"""The losses that come with dsclip. Each is a similarity and a criterion in the tiled stage."""

from __future__ import annotations

from dsclip.losses.cross_entropy import CrossEntropy
from dsclip.losses.group import ALONE, Group
from dsclip.losses.pairs import PLAIN, LossGrads, Negatives, Pairs
from dsclip.losses.sigmoid import Sigmoid
from dsclip.losses.similarity import Cosine, LateInteraction
from dsclip.losses.stage import contrast


def softmax(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """InfoNCE, the CLIP loss −½·mean(log p_ii) − ½·mean(log q_ii) (Radford et al. 2021, figure 3).

    With G = (p + q − 2·Id)/(2N): dI = s·G·T, dT = s·Gᵀ·I, d log s = Σ G∘S. Raises nothing; see `Pairs` for shapes.
    """
    return contrast(
        pairs, similarity=Cosine, criterion=CrossEntropy, negatives=negatives, group=group, tile_entries=tile_entries
    )


def sigmoid(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """SigLIP (Zhai et al. 2023): −(1/N) Σ_ij log σ(z_ij(S_ij + b)), z = 1 for pairs and −1 otherwise. Needs a bias."""
    return contrast(
        pairs, similarity=Cosine, criterion=Sigmoid, negatives=negatives, group=group, tile_entries=tile_entries
    )


def filip(
    pairs: Pairs, *, negatives: Negatives = PLAIN, group: Group = ALONE, tile_entries: int | None = None
) -> LossGrads:
    """FILIP (Yao et al. 2022): InfoNCE over token-wise late interaction. Features are tokens [n, T, d]."""
    return contrast(
        pairs,
        similarity=LateInteraction,
        criterion=CrossEntropy,
        negatives=negatives,
        group=group,
        tile_entries=tile_entries,
    )
