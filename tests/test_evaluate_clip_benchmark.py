"""The same features give CLIP_benchmark's numbers, where that package is installed: tools/compare_clip_benchmark.py says how."""

import argparse

import pytest

pytest.importorskip("clip_benchmark", reason="tools/compare_clip_benchmark.py says how to install it")
from tools.compare_clip_benchmark import compare  # noqa: E402


def test_every_task_has_their_numbers():
    found, _ = compare(argparse.Namespace())
    assert len(found) == 7
    for task, metrics in found.items():
        for name, value in metrics.items():
            tolerance = (
                2e-5 if task == "logistic_regression" else 1e-6
            )  # float32 means there; scikit-learn's own tolerance
            assert value["ours"] == pytest.approx(value["theirs"], abs=tolerance), (task, name)
    assert 1e-6 < found["linear_probe"]["regularisation"]["ours"] < 100, "the search ends within its range"
