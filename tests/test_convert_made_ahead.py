"""Weights that are made while earlier ones are written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dsclip.convert.hf import write_safetensors
from dsclip.convert.made_ahead import made_ahead
from dsclip.errors import UserError


def weights(count: int, made: list[str]) -> Iterator[tuple[str, Tensor]]:
    for i in range(count):
        made.append(str(i))
        yield str(i), torch.full((4,), float(i))


def test_weights_come_in_their_order_and_one_is_made_ahead():
    made: list[str] = []
    coming = made_ahead(weights(5, made))
    seen = []
    for name, tensor in coming:
        seen.append(name)
        assert tensor.tolist() == [float(name)] * 4
        assert len(made) <= len(seen) + 1
    assert seen == ["0", "1", "2", "3", "4"] == made


def test_an_error_comes_in_the_place_of_its_weight():
    def damaged() -> Iterator[tuple[str, Tensor]]:
        yield "first", torch.zeros(1)
        raise UserError("second is not finite")

    coming = made_ahead(damaged())
    assert next(coming)[0] == "first"
    with pytest.raises(UserError, match="second is not finite"):
        next(coming)


def test_a_weight_too_many_or_too_few_is_no_file(tmp_path):
    shapes = [(str(i), torch.Size([4]), torch.float32) for i in range(3)]
    with pytest.raises(ValueError, match="3 came, which wasn't said to"):
        write_safetensors(shapes, weights(4, []), tmp_path, 20)
    with pytest.raises(ValueError, match="2 did not come"):
        write_safetensors(shapes, weights(2, []), tmp_path, 20)
