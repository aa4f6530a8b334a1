"""The size of tiles follows from the shapes alone, so that a resumed run sums as the first one did."""

import inspect

import pytest
import torch

from dsclip.losses.tile_size import CPU_ENTRIES, CUDA_ENTRIES, tile_shape

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("device", "entries"), [(CPU, CPU_ENTRIES), (CUDA, CUDA_ENTRIES)])
@pytest.mark.parametrize("cells", [1, 50 * 77])
def test_a_tile_fills_a_fixed_number_of_entries(device, entries, cells):
    height, width = tile_shape(1 << 20, 1 << 20, cells, None, device)
    assert 0.8 * entries <= height * width * cells <= entries


def test_small_blocks_are_one_tile():
    assert tile_shape(256, 1024, 1, None, CPU) == (256, 1024)


def test_nothing_but_shapes_and_device_decides():
    assert list(inspect.signature(tile_shape).parameters) == ["rows", "cols", "cells", "entries", "device"]


@pytest.mark.parametrize(
    ("rows", "cols", "cells", "entries", "device", "shape"),
    [
        (1 << 20, 1 << 20, 1, None, CPU, (512, 1024)),
        (1 << 20, 1 << 20, 1, None, CUDA, (5761, 11_648)),
        (1 << 20, 1 << 20, 1, 2112, CPU, (33, 64)),
        (1 << 20, 1 << 20, 1, 2113, CPU, (16, 128)),
        (1 << 20, 100, 1, 20_000, CPU, (200, 100)),
        (5, 3, 1, 1, CPU, (1, 1)),
        (5, 1, 1, 4, CPU, (4, 1)),
    ],
)
def test_the_shapes_of_runs_that_exist(rows, cols, cells, entries, device, shape):
    """Another shape changes the last digits of a run that is continued by a later version: a change must be meant."""
    assert tile_shape(rows, cols, cells, entries, device) == shape
