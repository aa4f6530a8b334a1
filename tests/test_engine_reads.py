"""A step reads nothing from the device: a read waits until the device has nothing left to do."""

import math
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsclip
from dsclip.config.schema import LossSection
from dsclip.engine.finite import finite_or
from dsclip.engine.host_copy import HostCopy
from dsclip.model.layer_major import _LayerMajor
from tests.distributed.exactness_worker import build, global_batch
from tests.distributed.launch import alone

OURS = Path(dsclip.__file__).parent
# AdamW of the scalars counts its steps on the host; captions are cut by tokens that lie there; DeepSpeed reads its own.
HOST = ("/torch/optim/", "/dsclip/model/captions.py", "/deepspeed/")


class Reads(TorchDispatchMode):
    """The lines of dsclip that read a tensor's value."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            frames = [f for f in traceback.extract_stack() if any(h in f.filename for h in (*HOST, str(OURS)))]
            if frames and not any(h in frames[-1].filename for h in HOST):
                self.lines.append(f"{frames[-1].filename}:{frames[-1].lineno}")
        return function(*args, **(kwargs or {}))


QUEUE = LossSection(queue_size=16, queue_warmup_steps=1, queue_momentum=0.9)


@pytest.mark.parametrize(("stage", "loss"), [(1, None), (3, None), (1, QUEUE)])
def test_a_step_reads_nothing_until_its_numbers_are_looked_at(stage, loss):
    """`Reads` doesn't see what is copied; on a GPU that is what torch's own mode is for, below."""
    with alone() as group:
        engine = build(stage, 2, 2, 0.0 if loss else 0.5, True, group, loss)
        first = engine.train_step(global_batch(0), measure=False)
        assert first.loss > 0, "there was nothing before it"
        with Reads() as reads:
            unmeasured = engine.train_step(global_batch(1), measure=False)
            measured = engine.train_step(global_batch(2))
        assert reads.lines == []
        assert (unmeasured.step, unmeasured.loss, unmeasured.skipped) == (2, first.loss, False)
        with Reads() as reads:
            loss_now = measured.loss
        assert len(reads.lines) == 1 and loss_now != first.loss
        engine.close()


def test_numbers_are_those_of_the_moment_in_every_digit():
    tensors = {
        "third": torch.tensor(1 / 3), "count": torch.tensor(2**40 + 1), "rows": torch.randn(3, 4), "none": torch.zeros(0, 2),
    }  # fmt: skip
    copy = HostCopy(tensors)
    before = {name: x.clone() for name, x in tensors.items()}
    for x in tensors.values():
        x.zero_()
    assert all(torch.equal(copy[name], x.double()) and copy[name].shape == x.shape for name, x in before.items())
    assert "rows" in copy and "column" not in copy


def test_samples_whose_average_overflowed_are_replaced_and_no_others():
    x, instead = torch.randn(2, 4, 3, 5)
    x[1, 0, 0], x[2, 2, 4] = torch.inf, torch.nan
    expected = torch.stack([x[0], instead[1], instead[2], x[3]])
    with Reads() as reads:
        found = finite_or(x, instead.double())
    assert torch.equal(found, expected) and found.dtype == x.dtype and not reads.lines
    assert torch.equal(finite_or(x[:, 0], instead[:, 0]), torch.cat([x[:1, 0], instead[1:2, 0], x[2:, 0]]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("stage", "loss"), [(1, None), (3, None), (1, QUEUE)])
def test_on_a_gpu_no_step_waits_for_it(stage, loss, monkeypatch):
    """torch raises at a call that waits. DeepSpeed's own part of a step may: its epilogue of a backward, and its norm."""

    def in_mode(mode, function):
        def run(*args, **kwargs):
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(before)

        return run

    with alone() as group:
        engine = build(stage, 2, 2, 0.0 if loss else 0.5, True, group, loss)
        if engine.device.type != "cuda":
            pytest.skip("DS_ACCELERATOR keeps the engine off the GPU")
        batches = [global_batch(step).to(engine.device) for step in range(4)]
        for batch in batches[:2]:
            assert engine.train_step(batch).loss > 0
        monkeypatch.setattr(engine.deepspeed, "backward", in_mode("default", engine.deepspeed.backward))
        monkeypatch.setattr(engine.deepspeed, "step", in_mode("default", engine.deepspeed.step))
        # Ours within DeepSpeed's.
        monkeypatch.setattr(_LayerMajor, "backward", staticmethod(in_mode("error", _LayerMajor.backward)))
        step = in_mode("error", engine.train_step)
        metrics = [step(batches[2], measure=False), step(batches[3])]
        assert metrics[1].loss != metrics[0].loss
        with pytest.raises(RuntimeError, match="synchroniz"):
            in_mode("error", lambda: torch.ones((), device=engine.device).item())()
        engine.close()


def test_numbers_of_a_skipped_step_are_no_later_steps():
    with alone() as group:
        engine = build(1, 1, 1, 0.0, True, group)
        first = engine.train_step(global_batch(0))
        broken = global_batch(1)
        skipped = engine.train_step(replace(broken, images=broken.images.float() * torch.nan), measure=False)
        assert skipped.skipped and not math.isfinite(skipped.loss)
        later = engine.train_step(global_batch(2), measure=False)
        assert (later.step, later.skipped, later.loss, later.grad_norm) == (3, False, first.loss, first.grad_norm)
        engine.close()
