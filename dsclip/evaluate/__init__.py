"""Evaluation: zero-shot classification and retrieval, the same on any number of ranks."""

from dsclip.evaluate.retrieval import retrieval, retrieval_metrics
from dsclip.evaluate.zeroshot import classification_metrics, zeroshot

__all__ = ["classification_metrics", "retrieval", "retrieval_metrics", "zeroshot"]
