"""One evaluation of the loss with its gradients: tiled, or dense with autograd. `python -m dsclip.bench.loss JSON`."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from dsclip.bench.measure import peak_mb, reset_peak, settle
from dsclip.losses import LossGrads, Pairs, softmax


def dense(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The CLIP loss as everyone writes it."""
    leaves = [x.detach().requires_grad_() for x in (image, text, log_scale)]
    logits = leaves[2].exp() * leaves[0] @ leaves[1].T
    target = torch.arange(len(image), device=image.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, *torch.autograd.grad(loss, leaves)


def tiled(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> LossGrads:
    """dsclip's loss, in tiles."""
    return softmax(Pairs(image, text, log_scale))


def measure(variant: str, n: int, d: int, repeats: int) -> dict[str, float]:
    """{"seconds": best of the repeats, "extra_peak_mb": of the first}. Raises nothing; needs memory for the variant."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    image, text = (torch.empty(n, d, device=device).normal_(generator=generator) for _ in range(2))
    for x in (image, text):
        x.div_(x.norm(dim=1, keepdim=True))
    log_scale = torch.tensor(math.log(1 / 0.07), device=device)
    variants: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]] = {"tiled": tiled, "dense": dense}
    run = variants[variant]
    run(image[:256], text[:256], log_scale)  # compiles, allocates workspaces
    reset_peak()
    before, extra = peak_mb(), 0.0
    seconds: list[float] = []
    for repeat in range(repeats):
        settle()
        start = time.perf_counter()
        result = run(image, text, log_scale)
        settle()
        seconds.append(time.perf_counter() - start)
        if repeat == 0:
            extra = peak_mb() - before
        del result
    return {"seconds": min(seconds), "extra_peak_mb": extra}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
