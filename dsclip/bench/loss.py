"""One evaluation of a loss with its gradients: dsclip's, dense with autograd, or a package's. `python -m dsclip.bench.loss JSON`."""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable
from typing import get_args

import torch
import torch.nn.functional as F

from dsclip.bench.measure import peak_mb, reset_peak, seconds_of
from dsclip.losses import LossGrads, Pairs, sigmoid, softmax
from dsclip.losses.cross_entropy import CrossEntropy
from dsclip.losses.group import ALONE
from dsclip.losses.pairs import PLAIN
from dsclip.losses.products import Precision
from dsclip.losses.similarity import Cosine
from dsclip.losses.tiled import tiled_loss


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


def tiled_in(precision: Precision) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], LossGrads]:
    """dsclip's loss with the products of its tiles in this precision."""

    def run(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> LossGrads:
        return tiled_loss(
            Pairs(image, text, log_scale), similarity=lambda scratch: Cosine(scratch, precision), criterion=CrossEntropy,
            negatives=PLAIN, group=ALONE,
        )  # fmt: skip

    return run


def tiled_bf16(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> LossGrads:
    """dsclip's loss of features that travelled in bf16, in the device's precision."""
    return softmax(Pairs(image.bfloat16(), text.bfloat16(), log_scale))


def tiled_sigmoid(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> LossGrads:
    """dsclip's SigLIP loss, in tiles."""
    return sigmoid(Pairs(image, text, log_scale, bias=torch.full_like(log_scale, -10.0)))


def memeff(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The package memeff's CLIP loss on bf16 features; its temperature is fixed and gets no gradient."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(math.exp(-log_scale.item()), normalized_inputs=True, stable=False)
    leaves = [x.bfloat16().requires_grad_() for x in (image, text)]
    return torch.autograd.grad(loss(*leaves), leaves)


def siglip_kernel(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The package siglip-kernel's SigLIP loss on bf16 features."""
    from siglip_kernel import fused_siglip_loss

    features = [x.bfloat16().requires_grad_() for x in (image, text)]
    scalars = [log_scale.detach().requires_grad_(), torch.full_like(log_scale, -10.0).requires_grad_()]
    return torch.autograd.grad(fused_siglip_loss(*features, *scalars), [*features, *scalars])


VARIANTS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]] = {
    "tiled": tiled, "dense": dense, "tiled_sigmoid": tiled_sigmoid, "tiled_bf16": tiled_bf16, "memeff": memeff, "siglip_kernel": siglip_kernel,
    **{f"tiled_{precision}": tiled_in(precision) for precision in get_args(Precision)},
}  # fmt: skip


def installed(variant: str) -> bool:
    """Whether a variant can be measured here: a package's needs the package, and a GPU."""
    packaged = variant in ("memeff", "siglip_kernel")
    return not packaged or (torch.cuda.is_available() and importlib.util.find_spec(variant) is not None)


def random_features(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(image, text) unit rows [n, d] and log_scale [], of this process's device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    image, text = (torch.empty(n, d, device=device).normal_(generator=generator) for _ in range(2))
    for x in (image, text):
        x.div_(x.norm(dim=1, keepdim=True))
    return image, text, torch.tensor(math.log(1 / 0.07), device=device)


def measure(variant: str, n: int, d: int, repeats: int) -> dict[str, float]:
    """{"seconds": the median of the repeats, "extra_peak_mb": of the first}. Needs memory for the variant."""
    image, text, log_scale = random_features(n, d)
    run = VARIANTS[variant]
    run(image[:256], text[:256], log_scale)  # compiles, allocates workspaces
    reset_peak()
    before = peak_mb()
    first = seconds_of(lambda: run(image, text, log_scale), 1, warm_up=0)
    extra = peak_mb() - before
    rest = seconds_of(lambda: run(image, text, log_scale), repeats - 1, warm_up=0)
    return {"seconds": statistics.median(rest or first), "extra_peak_mb": extra}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
