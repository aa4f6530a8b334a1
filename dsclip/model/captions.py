"""The captions of a micro-batch, sorted by length and cut into chunks that are padded to what they need.

The text tower is causal, so nothing after the end token counts. Lengths are read from host memory: a length read from a
GPU would wait until the GPU has nothing left to do. Shapes: n captions, L tokens of the context, b of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dsclip.errors import UserError
from dsclip.model.config import ClipConfig

TEXT_LENGTH_MULTIPLE = 8  # few distinct shapes, which compilers like
SHARES = 8  # a micro-batch is cut at eighths of its captions: few distinct shapes again

# Tokens that a cut must save, for what one more pass of a layer costs: its launches, and one more addition of the weights'
# gradients. Our guesses; a GPU waits longer for launches than a CPU.
CUT_COSTS = {"cpu": 128, "cuda": 4096}


@dataclass(frozen=True)
class Captions:
    """Chunks of sorted captions on the device: tokens, each [b, length], and the positions of their end tokens, each [b].

    place [n]: where each caption stands in the chunks, one after the other; None where they are in order.
    """

    chunks: tuple[Tensor, ...]
    ends: tuple[Tensor, ...]
    place: Tensor | None

    def in_order(self, chunks: tuple[Tensor, ...]) -> Tensor:
        """What the chunks [b, ...] became, in the order in which the captions were given, [n, ...]."""
        joined = torch.cat(chunks)
        return joined if self.place is None else joined.index_select(0, self.place)

    def valid(self, context: int) -> Tensor:
        """[n, context] bool: the tokens of each caption up to its end token."""
        ends = self.in_order(self.ends)
        return torch.arange(context, device=ends.device) <= ends[:, None]


def end_positions(tokens: Tensor, config: ClipConfig) -> Tensor:
    """Where the end token of each caption stands, [n]; 0 without one, which the tokenizers always write. tokens [n, L]."""
    return (tokens == config.eot_token_id).int().argmax(dim=1)


def cut_captions(tokens: Tensor, config: ClipConfig, chunk_size: int | None, device: torch.device) -> Captions:
    """Sorts captions by length and copies them to the device in chunks of at most chunk_size (None: as few as pay).

    tokens [n, L]: in host memory; others are read back first. Raises UserError for captions that are too long.
    """
    if tokens.shape[1] > config.context_length:
        raise UserError(f"captions have {tokens.shape[1]} tokens; this model takes {config.context_length}")
    tokens = tokens.cpu()
    ends = end_positions(tokens, config)
    needed, order = ends.sort(stable=True)
    multiple = TEXT_LENGTH_MULTIPLE
    lengths = [min(tokens.shape[1], -(-(end + 1) // multiple) * multiple) for end in needed.tolist()]
    sizes = _chunk_sizes(lengths, chunk_size, CUT_COSTS.get(device.type, CUT_COSTS["cuda"]))
    stops = list(accumulate(sizes))
    if len(sizes) == 1:
        order = torch.arange(len(tokens))
    cut = [tokens[order[stop - size : stop], : lengths[stop - 1]] for size, stop in zip(sizes, stops, strict=True)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    # All in one copy, from pinned memory: the host doesn't wait for it.
    *chunks, ends, place = _copied([*cut, ends[order], place], device)
    return Captions(tuple(chunks), ends.split(sizes), None if len(sizes) == 1 else place)


def _chunk_sizes(lengths: list[int], chunk_size: int | None, cut_cost: int) -> list[int]:
    """Sizes of the chunks of sorted captions, each as long as its last one.

    Of all ways to cut at eighths of the captions, and at every chunk_size, the one that costs least: Σ size · length, and
    cut_cost for each chunk.
    """
    n = len(lengths)
    size = n if chunk_size is None else min(chunk_size, n)
    share = max(1, -(-size // SHARES))
    borders = sorted({*range(0, n, share), *range(0, n, max(1, size)), n})
    costs, starts = (
        [0],
        [0],
    )  # the least cost of the captions before each border, and the border where its last chunk starts
    for index in range(1, len(borders)):
        stop, options = borders[index], []
        for start in range(index - 1, -1, -1):
            if stop - borders[start] > size:
                break
            options.append((costs[start] + (stop - borders[start]) * lengths[stop - 1] + cut_cost, start))
        cost, start = min(options)
        costs.append(cost)
        starts.append(start)
    sizes, index = [], len(borders) - 1
    while index:
        sizes.append(borders[index] - borders[starts[index]])
        index = starts[index]
    return sizes[::-1] or [n]


def _copied(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return [x.contiguous() for x in tensors]
    flat = torch.cat([x.flatten() for x in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
