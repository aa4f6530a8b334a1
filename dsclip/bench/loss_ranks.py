"""One evaluation of the loss over several ranks, features gathered or in a ring. `torchrun -m dsclip.bench.loss_ranks JSON`."""

from __future__ import annotations

import json
import statistics
import sys

import torch
import torch.distributed as dist

from dsclip.bench.loss import random_features
from dsclip.bench.measure import peak_mb, reset_peak, seconds_of
from dsclip.distributed import Collectives, launched_ranks, shutdown_distributed
from dsclip.losses import Pairs, softmax


def measure(gather: str, n: int, d: int, repeats: int) -> dict[str, float]:
    """{"seconds": the median of the repeats, "extra_peak_mb": of the first, of the rank that took most}. Collective.

    n: global batch; its features are drawn on every rank alike.
    """
    group = Collectives(dist.get_rank(), dist.get_world_size(), in_ring=gather == "ring")
    local = n // group.world_size
    image, text, log_scale = random_features(n, d)
    mine = slice(group.rank * local, (group.rank + 1) * local)
    pairs = Pairs(image[mine].clone(), text[mine].clone(), log_scale)
    small = Pairs(pairs.image[:8], pairs.text[:8], log_scale)
    del image, text
    softmax(small, group=group)  # compiles, connects
    group.barrier()
    reset_peak()
    before = peak_mb()
    first = seconds_of(lambda: softmax(pairs, group=group), 1, warm_up=0)
    extra = max(group.all_gather_object(peak_mb() - before))
    rest = seconds_of(lambda: softmax(pairs, group=group), repeats - 1, warm_up=0)
    return {"seconds": statistics.median(rest or first), "extra_peak_mb": extra}


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(launched_ranks()[2])
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    found = measure(**json.loads(sys.argv[1]))
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    shutdown_distributed()
