"""Evaluation: zero-shot classification, retrieval, hard negatives; the same on any number of ranks."""

from dsclip.evaluate.hard_negatives import hard_negatives
from dsclip.evaluate.retrieval import retrieval, retrieval_metrics
from dsclip.evaluate.zeroshot import classification_metrics, zeroshot

__all__ = ["classification_metrics", "hard_negatives", "retrieval", "retrieval_metrics", "zeroshot"]
