"""A step that isn't logged reads nothing from the device: a read waits until the device has nothing left to do."""

import math
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dsclip
from dsclip.losses.feature_statistics import feature_statistics
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


@pytest.mark.parametrize("stage", [1, 3])
def test_only_a_measured_step_reads_the_device(stage):
    with alone() as group:
        engine = build(stage, 2, 2, 0.5, True, group)
        first = engine.train_step(global_batch(0), measure=False)
        assert first.loss > 0, "there was nothing before it"
        with Reads() as reads:
            metrics = engine.train_step(global_batch(1), measure=False)
        assert reads.lines == []
        assert (metrics.step, metrics.loss, metrics.skipped) == (2, first.loss, False)
        with Reads() as reads:
            metrics = engine.train_step(global_batch(2))
        assert reads.lines and metrics.loss != first.loss
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


def test_entries_off_the_diagonal_come_row_by_row():
    image, text = torch.randn(2, 5, 8)
    statistics = feature_statistics(image, text)
    assert torch.equal(statistics.negative, (image @ text.T)[~torch.eye(5, dtype=torch.bool)])
