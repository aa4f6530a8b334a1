"""The captions of a micro-batch, sorted by length and cut into chunks that are padded to what they need.

A causal text tower sees nothing after the end token. One that is pooled at its last position sees all of the context, and
its captions stay whole and in order. Lengths are read from host memory: a length read from a
GPU would wait until the GPU has nothing left to do. Shapes: n captions, L tokens of the context, b of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise

import torch
from torch import Tensor

from dsclip.errors import UserError
from dsclip.model.config import ClipConfig

TEXT_LENGTH_MULTIPLE = 8  # few distinct shapes, which compilers like
FEW = 4  # chunks of captions that nothing else cuts, from this many captions in each on
LEAST = 8
SHARES = 8  # they are cut at eighths: few distinct shapes again


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
    """Which token of each caption is pooled, [n]: its end token, or the last. tokens [n, L].

    0 without an end token, which `cut_captions` refuses.
    """
    if config.text_pool == "last":
        return torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)
    return (tokens == config.eot_token_id).int().argmax(dim=1)


def _check_ends(tokens: Tensor, ends: Tensor, config: ClipConfig) -> None:
    """Pooled at their first token, which is the same in all, captions would all have one embedding."""
    without = tokens.gather(1, ends[:, None])[:, 0] != config.eot_token_id
    if without.any():
        raise UserError(
            f"{int(without.sum())} of {len(tokens)} captions have no end token {config.eot_token_id}, where the text tower is pooled; "
            "use the tokenizer that the model was made for, and keep the end token when captions are cut"
        )


def padded_length(tokens: int, most: int) -> int:
    """What so many tokens are padded to, at most `most`."""
    return min(most, -(-tokens // TEXT_LENGTH_MULTIPLE) * TEXT_LENGTH_MULTIPLE)


def chunk_count(samples: int, chunk_size: int | None) -> int:
    """How many chunks the captions of so many samples are cut into, whatever their lengths and their hard negatives.

    All ranks must have the same number: DeepSpeed notes every output of a layer in its trace, and ranks whose traces differ
    wait for each other forever.
    """
    if chunk_size is not None:
        return -(-samples // chunk_size)
    return FEW if samples >= FEW * LEAST else 1


def cut_captions(
    tokens: Tensor, config: ClipConfig, chunk_size: int | None, device: torch.device, *, samples: int | None = None
) -> Captions:
    """Sorts captions by length and copies them to the device in `chunk_count` chunks.

    tokens [n, L]: in host memory; others are read back first. samples: how many these are the captions of, hard negatives
    among them; None: n. Raises UserError for captions that are too long or have no end token.
    """
    if tokens.shape[1] > config.context_length:
        raise UserError(f"captions have {tokens.shape[1]} tokens; this model takes {config.context_length}")
    tokens = tokens.cpu()
    ends = end_positions(tokens, config)
    if config.text_pool == "last":
        return _whole(tokens, ends, config, chunk_count(samples or len(tokens), chunk_size), device)
    _check_ends(tokens, ends, config)
    needed, order = ends.sort(stable=True)
    lengths = [padded_length(end + 1, tokens.shape[1]) for end in needed.tolist()]
    count = chunk_count(samples or len(tokens), chunk_size)
    sizes = _equal_sizes(len(tokens), count) if chunk_size is not None else _best_sizes(lengths, count)
    stops = list(accumulate(sizes))
    if len(sizes) == 1:
        order = torch.arange(len(tokens))
    cut = [tokens[order[stop - size : stop], : lengths[stop - 1]] for size, stop in zip(sizes, stops, strict=True)]
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    # All in one copy, from pinned memory: the host doesn't wait for it.
    *chunks, ends, place = _copied([*cut, ends[order], place], device)
    return Captions(tuple(chunks), ends.split(sizes), None if len(sizes) == 1 else place)


def _whole(tokens: Tensor, ends: Tensor, config: ClipConfig, count: int, device: torch.device) -> Captions:
    """All of each caption, padding included: every token sees it, and so it was in training."""
    if tokens.shape[1] != config.context_length:
        raise UserError(
            f"captions have {tokens.shape[1]} tokens; this model is pooled at its last position and takes {config.context_length}, padded"
        )
    sizes = _equal_sizes(len(tokens), count)
    *chunks, ends = _copied([*tokens.split(sizes), ends], device)
    return Captions(tuple(chunks), ends.split(sizes), None)


def _equal_sizes(n: int, count: int) -> list[int]:
    """n in so many parts that differ by one at most."""
    return [n * (i + 1) // count - n * i // count for i in range(count)]


def _best_sizes(lengths: list[int], count: int) -> list[int]:
    """Sizes of so many chunks of sorted captions: of all ways to cut at eighths, the one with the fewest tokens."""
    n = len(lengths)
    eighths = [n * i // SHARES for i in range(1, SHARES)]

    def tokens(cuts: tuple[int, ...]) -> int:
        return sum((stop - start) * lengths[stop - 1] for start, stop in pairwise((0, *cuts, n)))

    cuts = min(combinations(eighths, count - 1), key=tokens)
    return [stop - start for start, stop in pairwise((0, *cuts, n))]


def _copied(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return [x.contiguous() for x in tensors]
    flat = torch.cat([x.flatten() for x in tensors])
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
