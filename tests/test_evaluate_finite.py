"""A model that diverged gets no score, and its run is no success."""

from types import SimpleNamespace

import pytest
import torch

from dsclip.distributed import Collectives
from dsclip.errors import RunFailed, UserError
from dsclip.evaluate import Embedder, measure_classification, measure_retrieval
from dsclip.train.watch import Watch


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_not_measured(broken):
    def encode(tokens):
        features = torch.ones(len(tokens), 4)
        features[tokens[:, 0] == 2] = broken
        return features

    def tokenizer(texts, context_length):
        return torch.tensor([[len(text)] * context_length for text in texts])

    embedder = Embedder(encode, encode, tokenizer, Collectives.single(), context_length=3, batch_size=2)
    assert embedder.texts(["a", "abc"]).shape == (2, 4)
    with pytest.raises(UserError, match="text features are not finite .1 of 3 rows.: the model's training diverged"):
        embedder.texts(["a", "ab", "abc"])


@pytest.mark.parametrize("side", ["image", "text"])
def test_metrics_of_features_that_are_not_finite_are_refused(side):
    features = {"image": torch.eye(3), "text": torch.eye(3)}
    features[side][1, 2] = torch.nan
    with pytest.raises(UserError, match=f"{side} features are not finite"):
        measure_retrieval(features["image"], features["text"], torch.arange(3))
    with pytest.raises(UserError, match="logits are not finite"):
        measure_classification(features["image"] @ features["text"].T, torch.arange(3))


@pytest.mark.parametrize(
    ("steps", "in_a_row", "words"),
    [(3, 3, "all 3 steps were skipped"), (25, 24, "the last 24 steps"), (25, 9, None), (0, 0, None)],
)
def test_a_run_that_ends_with_skipped_steps_failed(steps, in_a_row, words):
    watch = SimpleNamespace(_steps=steps, _skipped_in_a_row=in_a_row, fails=lambda: False)
    if words is None:
        Watch.check_applied(watch)
    else:
        with pytest.raises(RunFailed, match=words):
            Watch.check_applied(watch)
