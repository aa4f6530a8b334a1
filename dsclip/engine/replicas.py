"""Whether what must be equal on all ranks is: silent faults of memory, arithmetic or network show as replicas that differ.

Compared are checksums, before the optimizer's step: ZeRO then makes trained weights anew from the masters, of which each rank has
its own, and a flipped bit of theirs would be gone with what it did to this step's gradients left in the update.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dsclip.distributed import Collectives
from dsclip.errors import RunFailed

ROW = 1024  # numbers that are added up before they are weighted
SHOWN = 3  # names in a message
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(x: Tensor) -> Tensor:
    """int64 [] of a tensor's bits, modulo 2⁶⁴: rows of 1024 numbers, taken as integers, are summed and weighted by odd numbers.

    Any single flipped bit changes it, and it is the same on every device: integers are added exactly in any order.
    """
    bits = x.detach().contiguous().view(-1).view(_AS_INTEGERS[x.element_size()])
    whole = bits.numel() - bits.numel() % ROW
    rows = torch.cat(
        [bits[:whole].view(-1, ROW).sum(1, dtype=torch.int64), bits[whole:].sum(dtype=torch.int64).view(1)]
    )
    # Odd multiples of the golden ratio's 64 bits (Knuth): a product with one is zero for no power of two below 2⁶⁴.
    weights = torch.arange(1, 2 * len(rows), 2, device=x.device) * -7046029254386353131
    return (rows * weights).sum()


class Part(Protocol):
    """A part of an engine's state beside its weights."""

    def replicated(self) -> dict[str, Tensor]:
        """What of it every rank holds whole, by name."""


def replicated_state(model: nn.Module, *parts: Part | None) -> dict[str, Tensor]:
    """What every rank holds whole: of the weights all under ZeRO-1 and 2, those that ZeRO-3 has gathered and keeps; and of other parts."""
    found = {}
    for name, p in model.named_parameters():
        status = getattr(p, "ds_status", None)
        if status is None or (getattr(p, "ds_persist", False) and status.name == "AVAILABLE"):
            found[name] = p.data
    found |= dict(model.named_buffers())
    for part in parts:
        found |= {} if part is None else part.replicated()
    return found


def check_replicas(tensors: Mapping[str, Tensor], words: Mapping[str, Any], group: Collectives, step: int) -> None:
    """Raises RunFailed, on all ranks alike, that names what differs and on which rank. Collective; one read of the device.

    tensors: of the same names on all ranks, on one device or the host; words: other things that must be equal, ready for JSON.
    """
    if group.world_size == 1:
        return
    device = next(iter(tensors.values())).device
    sums = [checksum(x).to(device) for x in tensors.values()]
    digest = hashlib.sha256(json.dumps(words, sort_keys=True).encode()).digest()
    sums.append(torch.tensor(int.from_bytes(digest[:8], "big", signed=True), device=device))
    mine = torch.stack(sums)
    of_ranks = group.all_gather(checksum(mine).view(1)).tolist()
    if len(set(of_ranks)) == 1:
        return
    names = [*tensors, *words]
    host, values = socket.gethostname(), [*mine[:-1].tolist(), *(json.dumps(word) for word in words.values())]
    raise RunFailed(_difference(names, group.all_gather_object((host, values)), of_ranks, step))


def _difference(names: list[str], said: list[tuple[str, list[Any]]], of_ranks: list[int], step: int) -> str:
    """One sentence. said: by rank its host and what it holds of each name; of_ranks: by rank, equal where all of it is."""
    [(usual, most), *_] = Counter(of_ranks).most_common(1)
    odd = [rank for rank, digest in enumerate(of_ranks) if digest != usual]
    reference = said[of_ranks.index(usual)][1]
    differing = [name for i, name in enumerate(names) if any(said[rank][1][i] != reference[i] for rank in odd)]
    shown = ", ".join(differing[:SHOWN]) + (f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else "")
    who = ", ".join(f"{rank} on {said[rank][0]}" for rank in odd[:SHOWN]) + (", …" if len(odd) > SHOWN else "")
    against = (
        f"the other {most} ranks"
        if 2 * most > len(of_ranks)
        else f"rank {of_ranks.index(usual)} on {said[of_ranks.index(usual)][0]}"
    )
    unknown = "" if 2 * most > len(of_ranks) else " (which of them is right can't be told)"
    return (
        f"step {step}: rank{'s' * (len(odd) > 1)} {who} and {against} differ in {shown}, which must be equal on all ranks{unknown}: a fault of "
        "memory, of arithmetic or of the network. Nothing of this step was applied. Go on from the last checkpoint with --resume auto; if it "
        "comes back on the same machine, take that out and test it. train.replica_check_every=0 compares nothing"
    )
