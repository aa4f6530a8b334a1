"""Exactness on this device: the engine's gradients against float64 autograd on the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.step import make_batch
from dsclip.config import load_ds_config
from dsclip.config.schema import BatchSection, Checkpointing, OptimSection, Recipe
from dsclip.config.train_section import TrainSection
from dsclip.data import Batch
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_gradients, whole_weights
from dsclip.model import Clip, ClipConfig, resolve_preset

LIMIT_FP32, LIMIT_BF16 = 2e-5, 1.2  # relative to the norm; times the error of a plain bf16 step
Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A way through the batch."""

    stage: int
    bf16: bool
    micro_batches: int = 1
    chunks: int = 1
    checkpointing: Checkpointing = "none"
    compiled: bool = False

    def __str__(self) -> str:
        words = [f"ZeRO-{self.stage}", "bf16" if self.bf16 else "fp32"]
        words += [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        words += [f"{self.chunks} chunks", self.checkpointing] if self.chunks > 1 else []
        return ", ".join([*words, *(["compiled"] if self.compiled else [])])


TINY = (Case(3, False, 2, 2, "full"), Case(1, True))
CASES = tuple(
    Case(*way[:1], bf16, *way[1:])
    for bf16 in (False, True)
    for way in (
        (1,), (3,), (3, 3, 2, "selective"), (3, 1, 2, "full"), (3, 1, 2, "offload"),
        (1, 1, 1, "none", True), (3, 1, 2, "selective", True), (3, 1, 2, "full", True),
    )
)  # fmt: skip


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """A row a case: the gradient's relative error in fp32, and in bf16 the error over that of a plain bf16 step."""
    config = resolve_preset("demo", vision_layers=2, text_layers=2)
    n = 24 if settings.tiny else 96
    batch = make_batch(config, n, 0).to(torch.device(settings.device))
    for case in TINY if settings.tiny else CASES:
        engine = _engine(config, n, case)
        weights, scale = whole_weights(engine), engine.scalars.log_scale.detach().clone()
        engine.accumulate(batch)
        ours = whole_gradients(engine)
        engine.close()
        reference = gradients(config, weights, scale, batch, torch.float64)
        error = relative(ours, reference)
        if not case.bf16:
            yield Row(str(case), error, accept=LIMIT_FP32, at_most=True, exactness=True)
            continue
        plain = relative(gradients(config, weights, scale, batch, torch.bfloat16), reference)
        note = f"{error:.2e} against {plain:.2e} of a plain step"
        yield Row(str(case), error / plain, accept=LIMIT_BF16, at_most=True, exactness=True, note=note)


def _engine(config: ClipConfig, n: int, case: Case) -> ContrastiveEngine:
    micro_batch = -(-n // case.micro_batches)
    chunk = None if case.chunks == 1 else -(-micro_batch // case.chunks)
    sizes = BatchSection(n, None if micro_batch == n else micro_batch, chunk, case.checkpointing, accumulation="manual")
    train = TrainSection(steps=10, compile="on" if case.compiled else "off")
    recipe = Recipe(batch=sizes, optim=OptimSection(warmup_steps=0), train=train)
    ds_config = load_ds_config(f"zero{case.stage}_bf16", recipe, 1) | {"bf16": {"enabled": case.bf16}}
    if case.bf16 and case.stage == 1:
        ds_config["bf16"]["immediate_grad_update"] = True
    return ContrastiveEngine(recipe, ds_config, config)


def gradients(config: ClipConfig, weights: Gradients, log_scale: Tensor, batch: Batch, dtype: torch.dtype) -> Gradients:
    """Those of the plain model and the dense loss on the whole batch, by autograd in this dtype, as float64."""
    model = Clip(config).to(batch.images.device, dtype)
    model.load_state_dict(weights)
    image, text = model(batch.images, batch.tokens)
    wide = torch.promote_types(dtype, torch.float32)
    logits = log_scale.to(wide).exp() * image.to(wide) @ text.to(wide).T
    target = torch.arange(len(logits), device=logits.device)
    ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: Gradients, reference: Gradients) -> float:
    """‖ours − reference‖ / ‖reference‖ over all tensors."""
    difference = sum(float((ours[n].double() - g).square().sum()) for n, g in reference.items())
    return float((difference / sum(float(g.square().sum()) for g in reference.values())) ** 0.5)
