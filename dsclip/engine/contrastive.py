"""The contrastive engine: one optimizer step on exactly the loss of the whole global batch.

Symbols: n samples of this rank, N of all ranks, D embedding width, k outer micro-batches a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsclip.config.schema import BatchSection, Recipe
from dsclip.engine.build import build_model, init_distributed, initialize
from dsclip.engine.collectives import Collectives
from dsclip.engine.consolidate import DEEPSPEED_TAG
from dsclip.engine.logit_scale import LogitScale
from dsclip.engine.schedule import learning_rate
from dsclip.errors import UserError
from dsclip.losses import LOSSES, ContrastiveGrads
from dsclip.model import ClipConfig
from dsclip.model.patch_dropout import kept_patches


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, counted from 1. loss in nats; accuracies over the global batch; norm before clipping."""

    step: int
    loss: float
    accuracy_image_to_text: float
    accuracy_text_to_image: float
    logit_scale: float
    lr: float
    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class _MicroBatch:
    """What one forward needs. The same object goes through the towers twice, with the same kept patches."""

    images: Tensor
    tokens: Tensor
    kept: Tensor | None


class ContrastiveEngine:
    """DeepSpeed's engine with the step that contrastive learning needs.

    `train_step(batch)`: batch["images"] [n, 3, S, S] uint8 (or float, normalised), batch["tokens"] [n, L] int64,
    batch["sample_ids"] [n] int64. Its gradient equals that of a single process with the N samples in one batch, for
    every number of ranks, ZeRO stage, outer micro-batch and chunk size.
    """

    def __init__(
        self,
        recipe: Recipe,
        ds_config: dict,
        config: ClipConfig,
        *,
        state_dict: dict | None = None,
        init_scale: float | None = None,
    ):
        self.device = init_distributed()
        self.group = Collectives.current()
        self.recipe, self.config, self.ds_config = recipe, config, ds_config
        self.step = 0
        self._loss = partial(LOSSES[recipe.loss.name], group=self.group)
        model = build_model(config, ds_config, recipe.train.seed, state_dict)
        self.deepspeed = initialize(model, ds_config, recipe.optim)
        self.logit_scale = LogitScale(recipe.loss, recipe.optim, self.device)
        if init_scale is not None:
            self.logit_scale.set_scale(init_scale)

    @property
    def module(self):
        """The model. Under ZeRO-3 its parameters are shards: use `encode_image` and `encode_text`."""
        return self.deepspeed.module

    def train_step(self, batch: dict) -> StepMetrics:
        """One optimizer step on the global batch of which `batch` is this rank's share. Collective."""
        grads = self.accumulate(batch)
        lr = learning_rate(self.step, self.recipe.train.steps, self.recipe.optim)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        if applied:
            self.logit_scale.step(grads.d_log_scale, lr)
        self.step += 1
        return self._metrics(grads, lr, applied)

    def accumulate(self, batch: dict) -> ContrastiveGrads:
        """Features, loss and backward of the towers; the gradients then wait in DeepSpeed for its step.

        The last micro-batch keeps its graph and goes backward first; the others ran without one and run again.
        Every backward follows an engine forward: two in a row lose gradients silently in DeepSpeed 0.19.8.
        """
        micro = self._micro_batches(batch)
        with torch.no_grad():
            cached = [self._features(m) for m in micro[:-1]]
        features = self._features(micro[-1])
        image, text = (torch.cat([c[i] for c in cached] + [features[i].detach()]) for i in (0, 1))
        grads = self._loss(image, text, self.logit_scale.log.detach())

        sizes = [len(m.images) for m in micro]
        pairs = list(zip(grads.d_image.split(sizes), grads.d_text.split(sizes), strict=True))
        self._backward(features, pairs[-1], last=len(micro) == 1)
        del features
        for index, m in enumerate(micro[:-1]):
            self._backward(self._features(m), pairs[index], last=index == len(micro) - 2)
        return grads

    def _features(self, micro: _MicroBatch) -> tuple[Tensor, Tensor]:
        chunk_size, recompute = chunking(self.recipe.batch)
        return self.deepspeed(micro.images, micro.tokens, chunk_size=chunk_size, recompute=recompute, kept=micro.kept)

    def _backward(self, features, grads, *, last: bool) -> None:
        # ZeRO averages over ranks, and each rank holds the gradient of the global loss: hence the world size.
        surrogate = sum((f * g).sum() for f, g in zip(features, grads, strict=True)) * self.group.world_size
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(surrogate, scale_wrt_gas=False)

    def _micro_batches(self, batch: dict) -> list[_MicroBatch]:
        n = len(batch["images"])
        expected = self.recipe.batch.global_batch_size // self.group.world_size
        if n != expected or len(batch["tokens"]) != n:
            raise UserError(
                f"step {self.step}: rank {self.group.rank} was given {n} images and {len(batch['tokens'])} captions; "
                f"batch.global_batch_size over {self.group.world_size} ranks is {expected} pairs a rank"
            )
        size = self.recipe.batch.samples_per_forward or n
        parts = zip(*(batch[k].split(size) for k in ("images", "tokens", "sample_ids")), strict=True)
        return [_MicroBatch(self._put(i), self._put(t), self._kept(s)) for i, t, s in parts]

    def _put(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def _kept(self, sample_ids: Tensor) -> Tensor | None:
        if not self.config.patch_dropout:
            return None
        seed, share = self.recipe.train.seed, self.config.patch_dropout
        return kept_patches(self._put(sample_ids), self.config.patches, share, seed=seed, step=self.step)

    def _metrics(self, grads: ContrastiveGrads, lr: float, applied: bool) -> StepMetrics:
        correct = self.group.all_reduce_sum(torch.stack([grads.correct_image, grads.correct_text])).tolist()
        total = self.recipe.batch.global_batch_size
        norm = self.deepspeed.get_global_grad_norm()
        return StepMetrics(
            step=self.step,
            loss=grads.loss.item(),
            accuracy_image_to_text=correct[0] / total,
            accuracy_text_to_image=correct[1] / total,
            logit_scale=self.logit_scale.scale,
            lr=lr,
            grad_norm=float("nan") if norm is None else float(norm),
            skipped=not applied,
        )

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Unit features [b, D] of images [b, 3, S, S]. Collective under ZeRO-3: every rank calls it equally often."""
        return self.deepspeed(self._put(images), None)[0]

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Unit features [b, D] of tokens [b, L]. Collective under ZeRO-3: every rank calls it equally often."""
        return self.deepspeed(None, self._put(tokens))[1]

    def save(self, folder: Path) -> dict:
        """Writes the sharded weights and optimizer below `folder`; returns the rest of the state, ready for JSON.

        Collective. `dsclip.checkpoint` wraps this with a manifest and an atomic rename: prefer it.
        """
        self.deepspeed.save_checkpoint(str(folder), tag=DEEPSPEED_TAG, save_latest=False)
        if self.group.rank == 0:
            # A script that DeepSpeed drops for users to run; `tools/convert_hf.py` does its work after verification.
            for script in folder.glob("zero_to_*.py"):
                script.unlink()
        return {"step": self.step, "logit_scale": self.logit_scale.state()}

    def load(self, folder: Path, state: dict) -> None:
        """Restores what `save` wrote with the same number of ranks. Collective; `folder` must have been verified."""
        path, _ = self.deepspeed.load_checkpoint(str(folder), tag=DEEPSPEED_TAG)
        if path is None:
            raise UserError(f"DeepSpeed found no checkpoint in {folder}")
        self.step = state["step"]
        self.logit_scale.load_state(state["logit_scale"])

    def close(self) -> None:
        """Frees DeepSpeed's buffers and hooks; call it before `shutdown_distributed`."""
        self.deepspeed.destroy()
        self.deepspeed = None


def chunking(batch: BatchSection) -> tuple[int | None, bool]:
    """(chunk size, whether blocks keep only their inputs) that a recipe's batch section asks for."""
    recompute = batch.checkpointing == "full" or (batch.checkpointing == "auto" and batch.chunk_size is not None)
    return batch.chunk_size, recompute
