"""Losses: pure functions from features to the loss and its exact feature gradients."""

from dsclip.losses.group import Group, SingleRank
from dsclip.losses.softmax import ContrastiveGrads, softmax_contrastive

LOSSES = {"softmax": softmax_contrastive}

__all__ = ["LOSSES", "ContrastiveGrads", "Group", "SingleRank", "softmax_contrastive"]
