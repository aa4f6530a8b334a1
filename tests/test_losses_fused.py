"""The fused tiles against the plain ones and the references; on a GPU the whole loss."""

import math

import pytest
import torch

from dsclip import losses
from dsclip.losses import Pairs, cross_entropy, fused
from tests.test_losses import OPTIONS, Case, unit


@pytest.mark.parametrize("local", [5, 12])
@pytest.mark.parametrize("option", ["plain", "masked duplicates", "filter", "own hard negatives"])
def test_fused_tiles_equal_the_references(monkeypatch, option, local):
    used = []
    monkeypatch.setattr(cross_entropy, "use_fused", lambda like: True)
    monkeypatch.setattr(fused, "_state", {"usable": True})
    for name in ("log_sum_exp", "pair_weights"):
        plain = getattr(fused, f"_{name}")
        monkeypatch.setattr(fused, f"_{name}", lambda *a, plain=plain, name=name: (used.append(name), plain(*a))[1])
    monkeypatch.setattr(fused, "_compiled", lambda function: function)
    Case("softmax", 1, local, seed=local).check(OPTIONS[option], tile_entries=30)
    assert set(used) == {"log_sum_exp", "pair_weights"}


def test_compiled_tiles_equal_the_plain_ones():
    logits = 30 * torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    out = torch.rand(37, 50, generator=torch.Generator().manual_seed(1)) < 0.3
    out[3] = True  # a row with nothing left
    for excluded in (None, out):
        for dim in (0, 1):
            best, lse = fused.log_sum_exp(logits, excluded, dim)
            seen = logits if excluded is None else logits.masked_fill(excluded, -torch.inf)
            assert torch.equal(best, logits.amax(dim))
            assert torch.allclose(lse, seen.double().logsumexp(dim).float(), rtol=1e-6)
        row, col = logits.logsumexp(1), logits.logsumexp(0)
        weights = fused.pair_weights(logits, row, col, excluded, excluded)
        keep = 1 if excluded is None else ~excluded
        assert torch.allclose(weights, (logits.softmax(1) + logits.softmax(0)) * keep, rtol=1e-4, atol=1e-7)
    assert fused._state["usable"], "torch.compile worked here"


def test_tiles_on_a_cpu_are_not_fused():
    assert fused._state["usable"] and not fused.use_fused(torch.zeros(1))


def test_a_machine_without_a_compiler_goes_on_unfused(monkeypatch):
    def broken(function):
        raise RuntimeError("no g++")

    monkeypatch.setattr(fused, "_compiled", broken)
    monkeypatch.setattr(fused, "_state", {"usable": True})
    logits = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="no g\\+\\+"):
        _, lse = fused.log_sum_exp(logits, None, 1)
    assert torch.allclose(lse, logits.logsumexp(1)) and not fused._state["usable"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_memory_that_runs_out_is_no_missing_compiler(monkeypatch, wrapped):
    def exhausted(function):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            if wrapped:
                raise RuntimeError("backend failed") from error
            raise

    monkeypatch.setattr(fused, "_compiled", exhausted)
    monkeypatch.setattr(fused, "_state", {"usable": True})
    with pytest.raises(RuntimeError if wrapped else torch.OutOfMemoryError):
        fused.log_sum_exp(torch.randn(3, 4), None, 1)
    assert fused._state["usable"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_fused_loss_equals_the_plain_one(monkeypatch):
    image, text = (unit(3001, 512, seed=seed, dtype=torch.float32).cuda() for seed in (0, 1))
    pairs = Pairs(image, text, torch.tensor(math.log(100.0), device="cuda"))
    ours = losses.softmax(pairs)
    assert fused._state["usable"]
    monkeypatch.setattr(fused, "_state", {"usable": False})
    plain = losses.softmax(pairs)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-5, atol=0)
    for name in ("d_image", "d_text", "d_log_scale"):
        error = (getattr(ours, name) - getattr(plain, name)).norm()
        assert error <= 1e-5 * getattr(plain, name).norm()
