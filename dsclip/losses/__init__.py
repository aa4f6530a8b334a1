"""Losses: pure functions from features to the loss and its exact feature gradients."""

from dsclip.losses.builtin import filip, sigmoid, softmax
from dsclip.losses.dense import check_options, from_dense
from dsclip.losses.group import Group, SingleRank
from dsclip.losses.pairs import LossGrads, Negatives, Pairs
from dsclip.losses.registry import checked, find_loss, register

__all__ = [
    "Group", "LossGrads", "Negatives", "Pairs", "SingleRank", "check_options", "checked", "filip", "find_loss", "from_dense", "register",
    "sigmoid", "softmax",
]  # fmt: skip
