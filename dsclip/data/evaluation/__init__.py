"""Evaluation sets: a fixed list of samples, images decoded when they are needed."""
