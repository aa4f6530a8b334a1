"""One safetensors file of any size, written a tensor at a time: the library's own writer holds all of them, twice."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from dsclip.convert.weights import Named

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Shape = tuple[str, torch.Size, torch.dtype]  # of a weight, with its name


def write_one_file(path: Path, shapes: Iterable[Shape], weights: Named) -> None:
    """Writes weights of these shapes, which come in any order. Raises ValueError where one is another than was said, or lacks.

    Format: the header's length as uint64, little-endian; the header in JSON, with each tensor's place; the tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    expected: dict[str, tuple[torch.Size, torch.dtype, int]] = {}
    end = 0
    for name, shape, dtype in shapes:
        start, end = end, end + shape.numel() * dtype.itemsize
        expected[name] = shape, dtype, start
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)  # tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name, tensor in weights:
            shape, dtype, start = expected.pop(name, (torch.Size(), torch.float32, -1))
            if start < 0 or (shape, dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype} came, which wasn't said to")
            file.seek(8 + len(content) + start)
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if expected:
        raise ValueError(f"{', '.join(expected)} did not come")
