"""The checkpoint that conversion is measured on is one that DeepSpeed's reader puts together, and memory is what a process took."""

import sys
from dataclasses import replace

import pytest
import torch

from dsclip.bench.convert import _measure, _part, _watched, forget, write_zero3
from dsclip.checkpoint import read_checkpoint
from dsclip.convert import export_hf, load_hf_folder
from dsclip.errors import RunFailed, UserError
from tests.test_convert import small

RANKS = 3


def test_the_checkpoint_holds_the_parts_of_every_rank(demo, tmp_path):
    """Parameters whose size is no multiple of the ranks are padded."""
    config = replace(small("demo"), vision_width=80, vision_heads=2)
    numbers = write_zero3(tmp_path / "step_00000001", config, RANKS)
    checkpoint = read_checkpoint(tmp_path / "step_00000001")
    assert checkpoint.config == config and len(checkpoint.state_dict) > 40
    assert sum(x.numel() for x in checkpoint.state_dict.values()) == numbers
    assert any(x.numel() % RANKS for x in checkpoint.state_dict.values())
    for name, weight in checkpoint.state_dict.items():
        whole = torch.cat([_part(weight.shape, rank, RANKS) for rank in range(RANKS)])
        assert torch.equal(weight, whole[: weight.numel()].view(weight.shape)), name
    export_hf(checkpoint, tmp_path / "hf", max_shard_gb=1e-4)
    files = list(tmp_path.rglob("*.pt"))
    forget(files)
    weights = load_hf_folder(tmp_path / "hf")[1]
    assert all(torch.equal(weights[name], x) for name, x in checkpoint.state_dict.items())


def test_memory_is_what_the_process_took():
    used = _watched(
        [sys.executable, "-c", "import time; x = bytearray(b'x') * 300_000_000; time.sleep(0.3); print('{\"a\": 1}')"]
    )
    assert (
        0.3 < used.peak_gb < 0.5 and used.mapped_gb >= used.peak_gb and used.result == {"a": 1} and used.seconds > 0.3
    )
    with pytest.raises(RunFailed, match="exit code 3"):
        _watched([sys.executable, "-c", "raise SystemExit(3)"])


def test_what_can_not_be_measured_is_refused(tmp_path):
    from argparse import Namespace

    with pytest.raises(UserError, match="exists already"):
        _measure(Namespace(folder=tmp_path))
    with pytest.raises(UserError, match="--ranks is 0"):
        _measure(Namespace(folder=tmp_path / "a", ranks=0, depth=1.0))
