"""Checksums of what must be equal on all ranks, and what is said when it isn't."""

import re

import pytest
import torch

from dsclip.engine.replicas import ROW, checksum
from dsclip.errors import RunFailed
from tests.distributed import replicas_worker
from tests.distributed.launch import cases_of


def by_hand(x: torch.Tensor) -> int:
    """The same in Python's integers."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.contiguous().view(-1).view(kinds[x.element_size()]).tolist()
    rows = [bits[i : i + ROW] for i in range(0, len(bits) - len(bits) % ROW, ROW)] + [
        bits[len(bits) - len(bits) % ROW :]
    ]
    total = sum(sum(row) * (2 * i + 1) * 0x9E3779B97F4A7C15 for i, row in enumerate(rows))
    return (total + 2**63) % 2**64 - 2**63


TENSORS = [
    torch.randn(3, 700).bfloat16(), torch.randn(2 * ROW), torch.randn(5, 5, dtype=torch.float64), torch.tensor(1.5),
    torch.arange(ROW + 1), torch.rand(30) > 0.5, torch.zeros(0), torch.randn(64, 40).t(),
]  # fmt: skip


@pytest.mark.parametrize("x", TENSORS, ids=lambda x: f"{x.dtype}{list(x.shape)}")
def test_a_checksum_is_that_of_pythons_integers(x):
    assert checksum(x).item() == by_hand(x)


def test_every_single_flipped_bit_is_seen():
    x = torch.randn(3, 700).bfloat16()
    before, bits = checksum(x).item(), x.view(-1).view(torch.int16)
    for place in (0, 1, ROW - 1, ROW, 2 * ROW + 5, 2099):
        for bit in range(16):
            mask = torch.tensor(1 << bit if bit < 15 else -(1 << 15), dtype=torch.int16)
            bits[place] ^= mask
            assert checksum(x).item() != before
            bits[place] ^= mask
    assert checksum(x).item() == before


def test_rows_that_change_places_are_seen():
    x = torch.randn(4, ROW)
    assert checksum(x) != checksum(x[[1, 0, 2, 3]])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return cases_of(replicas_worker, 2, tmp_path_factory.mktemp("replicas"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whatever_differs_on_two_ranks_is_named(results, stage):
    [found] = [case for case in results if case["stage"] == stage]
    weight = "text.blocks.0.attn.qkv.weight"
    shown = {what: re.search(r"differ in (.*?), which must", said)[1] for what, said in found["said"].items()}
    averages = {} if stage == 3 else {"average": f"average of {weight}"}
    assert shown == {"weight": weight, "log_scale": "log_scale", "moment": "log_scale.exp_avg", "queue": "queue.text", "order": "order"} | averages  # fmt: skip
    for said in found["said"].values():
        assert re.match(r"RunFailed: step \d+: rank 1 on \S+ and rank 0 on \S+ differ in ", said), said
        assert "which of them is right can't be told" in said and "--resume auto" in said
    assert found["equal"], "without a difference nothing is said"
    assert found["trained"] == "step 3", "it compares at every third step alone"
    assert issubclass(RunFailed, Exception) and RunFailed.exit_code == 1, "the supervisor starts the run again"
