"""The contrastive engine: one optimizer step on exactly the loss of the whole global batch.

Symbols: n samples of this rank, N of all ranks, D embedding width, k micro-batches a rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsclip.config.deepspeed import resolve_persistence
from dsclip.config.schema import Recipe
from dsclip.data.batch import Batch
from dsclip.distributed import Collectives
from dsclip.engine.build import build_model, constructing, init_distributed, initialize
from dsclip.engine.expert_balance import ExpertBalance
from dsclip.engine.feature_queue import FeatureQueue
from dsclip.engine.finite import finite_or, one_if_finite, skip_reason
from dsclip.engine.gradient_sums import GradientSums
from dsclip.engine.host_copy import HostCopy
from dsclip.engine.locked_features import locked_features
from dsclip.engine.loss_inputs import LossInputs
from dsclip.engine.loss_scalars import LossScalars
from dsclip.engine.micro_batch import MicroBatch, MicroBatcher, split_gradients
from dsclip.engine.momentum import MomentumEncoder
from dsclip.engine.persistent import Persistent
from dsclip.engine.replicas import check_replicas, replicated_state
from dsclip.engine.state import EngineState, Sharding
from dsclip.engine.step_metrics import StepMetrics, pulse_numbers, step_numbers
from dsclip.errors import UserError
from dsclip.losses import Pairs
from dsclip.losses.feature_statistics import feature_statistics
from dsclip.model import Clip, ClipConfig, Encoder
from dsclip.model.captions import cut_captions
from dsclip.model.compiled import compile_blocks
from dsclip.model.device import check_device
from dsclip.model.trained import choose_trained
from dsclip.objectives import ObjectiveGrads, build_objective
from dsclip.optim.build import attach, optimizer_report, weight_average
from dsclip.optim.flat import flat_vectors
from dsclip.optim.groups import group_settings, set_learning_rate
from dsclip.optim.schedule import learning_rate
from dsclip.saving import Files


class ContrastiveEngine:
    """DeepSpeed's engine with the step that contrastive learning needs.

    `train_step(batch)` needs a `Batch` with images, tokens and sample ids; by the recipe's loss also with keys, hard tokens and their
    owners, and by its objective with further views and a teacher's features. Its gradient equals that of a single process with the N
    samples in one batch, for every number of ranks, ZeRO stage, micro-batch and chunk size.
    state_dict, init_scale, init_bias: weights, logit scale and a sigmoid loss's bias to start from; those of rank 0 count.
    Sizes that the batch section leaves open are plain: the local batch in one micro-batch, nothing computed again.
    `dsclip.plan.plan_recipe` fills them in from memory beforehand.
    """

    def __init__(
        self,
        recipe: Recipe,
        ds_config: dict[str, Any],
        config: ClipConfig,
        *,
        state_dict: dict[str, Tensor] | None = None,
        init_scale: float | None = None,
        init_bias: float | None = None,
    ):
        self.device = init_distributed()
        self.group = replace(Collectives.current(), in_ring=recipe.loss.gather == "ring")
        self.recipe, self.config = recipe, config
        self.ds_config = ds_config = resolve_persistence(ds_config, recipe.batch)
        self.step = 0
        self.forward_s = 0.0  # of the last step: the host's time before its first collective
        self._measured: StepMetrics | None = None
        self._micro_batcher = MicroBatcher(recipe, config, self.device, self.group.rank, self.group.world_size)
        settings = recipe.loss
        self.objective = build_objective(recipe, config.embed_dim)
        token_wise = self.objective.loss.token_wise
        self._loss_inputs = LossInputs(settings, self._micro_batcher, config.context_length, token_wise)
        encode = {"image": self.encode_image, "text": self.encode_text}
        self._locked = locked_features(recipe, config, self.group, encode)
        check_device(config, self.device, ds_config)
        model = build_model(config, ds_config, recipe.train.seed, state_dict)
        with constructing(ds_config):
            choose_trained(model, recipe.model, recipe.objective)
        if recipe.train.compile == "on" or (recipe.train.compile == "auto" and self.device.type == "cuda"):
            compile_blocks(model, required=recipe.train.compile == "on")
        self._experts = ExpertBalance(model, self.group, self.device)
        self.deepspeed = initialize(model, ds_config, recipe.optim)
        vectors = flat_vectors(self.deepspeed.optimizer, model, recipe.optim)
        attach(self.deepspeed.optimizer, vectors)
        of_groups = group_settings(self.deepspeed.optimizer)
        self.scalars = LossScalars(
            settings, recipe.optim, recipe.train.steps, self.device, has_bias=self.objective.loss.has_bias
        )
        if (init_scale := self.group.broadcast_object(init_scale)) is not None:
            self.scalars.set_scale(init_scale)
        if (init_bias := self.group.broadcast_object(init_bias)) is not None:
            self.scalars.set_bias(init_bias)
        self.queue: FeatureQueue | None = None
        self._momentum: MomentumEncoder | None = None
        if settings.queue_size:
            self.queue = FeatureQueue(settings, *self._feature_shapes(), self.device)
        if settings.queue_momentum is not None:
            self._momentum = MomentumEncoder(model, config, ds_config, settings.queue_momentum, self.device)
        self._average = weight_average(vectors, recipe.optim, self.scalars.named())
        self._persistent = Persistent(
            self.group, vectors, of_groups, self.scalars, self.queue, self._momentum, self._average
        )

    def _feature_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        config = self.config
        if not self.objective.loss.token_wise:
            return (config.embed_dim,), (config.embed_dim,)
        if config.patch_dropout:
            raise UserError("token-wise losses with a queue need model.patch_dropout 0: all images need equal tokens")
        return (config.image_tokens, config.embed_dim), (config.context_length, config.embed_dim)

    @property
    def module(self) -> Clip:
        """The model. Under ZeRO-3 its parameters are shards: use `encode_image` and `encode_text`."""
        module: Clip = self.deepspeed.module
        return module

    def train_step(self, batch: Batch, *, measure: bool = True) -> StepMetrics:
        """One optimizer step on the global batch of which `batch` is this rank's share. Collective.

        measure: copy this step's numbers from the device, the same on all ranks; whoever looks at one first waits for it.
        Otherwise step, lr and skipped are its own, and the rest that of the last step that was measured and applied; there
        is one after the first, and a step that is skipped is always measured. With hard negatives on several ranks, their
        counts are read in every step.
        A step with a number that isn't finite, on whichever rank, is skipped on all: see `engine/finite.py`.
        """
        self.scalars.before_step(self.step)
        grads, pairs, further = self._accumulate(batch)
        if (every := self.recipe.train.replica_check_every) and not (self.step + 1) % every:
            self.check_replicas(batch)
        lr = learning_rate(self.step, self.recipe.train.steps, self.recipe.optim)
        set_learning_rate(self.deepspeed.optimizer, lr)
        self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        self._experts.step(applied=applied)
        if applied:
            self.scalars.step(grads, lr)
            if self.queue is not None:
                self._fill_queue(self.queue, batch, pairs)
            for average in (self._momentum, self._average):
                if average is not None:
                    average.update()
        self.step += 1
        reason = None if applied else skip_reason((pairs.image, pairs.text, *further.values()), grads, self.group)
        if measure or not applied or self._measured is None:
            metrics = self._metrics(grads, lr, reason, batch, pairs)
            if applied:  # the numbers of a skipped step are no step's but its own
                self._measured = metrics
            return metrics
        pulse = HostCopy(pulse_numbers(grads.loss, self.deepspeed.get_global_grad_norm()))
        return replace(self._measured, step=self.step, lr=lr, pulse=pulse)

    def check_replicas(self, batch: Batch) -> None:
        """Raises RunFailed when ranks differ in what must be equal on all; to be called before the optimizer's step. Collective."""
        words = {"seed": self.recipe.train.seed, "queue": self.queue and self.queue.state()}
        words |= {name: (batch.state or {}).get(name) for name in ("batches", "order")}
        tensors = replicated_state(self.module, self.scalars, self.queue, self._momentum)
        check_replicas(tensors, words, self.group, self.step + 1)

    def accumulate(self, batch: Batch) -> ObjectiveGrads:
        """Features, loss and backward of the towers; the gradients then wait in DeepSpeed for its step.

        The last micro-batch keeps its graph and goes backward first; the others ran without one and run again, but in a tower
        that is locked.
        Every backward follows an engine forward: two in a row lose gradients silently in DeepSpeed 0.19.8.
        """
        return self._accumulate(batch)[0]

    def _accumulate(self, batch: Batch) -> tuple[ObjectiveGrads, Pairs, dict[str, Tensor]]:
        micro_batches = self._micro_batcher.split(batch, self.step)
        if self._locked is not None:
            micro_batches = self._locked.known(micro_batches)
        started = time.monotonic()
        with self._experts.counting():  # each token once: what runs below runs again
            with torch.no_grad():
                cached = [self._features(m) for m in micro_batches[:-1]]
            image, text = last = self._features(micro_batches[-1])
        # ZeRO-3 gathers weights in the forward: ranks have waited for each other in it.
        self.forward_s = time.monotonic() - started if self.sharding.stage < 3 else 0.0
        features = [*cached, (image.detach(), text.detach())]
        pairs, further = self._loss_inputs(micro_batches, features, batch, self.scalars, self.queue, self.step)
        teacher = self._loss_inputs.teacher(batch, self.step)
        grads = self.objective(pairs, further, group=self.group, step=self.step, teacher=teacher)
        gradients = split_gradients(micro_batches, grads, grads.d_views)
        # ZeRO averages over ranks, and each rank holds the gradient of the global loss: hence the world size.
        factor = self.group.world_size * one_if_finite(grads)
        with self._reduction() as sums:
            self._backward(last, gradients[-1], factor, last=len(micro_batches) == 1)
            del image, text, last
            for index, m in enumerate(micro_batches[:-1]):
                if sums is not None:
                    sums.take()
                again = m.knowing(cached[index], self.module)
                self._backward(self._features(again), gradients[index], factor, last=index == len(micro_batches) - 2)
            if sums is not None:
                sums.give()
        self.deepspeed.set_gradient_accumulation_boundary(True)
        return grads, pairs, further

    def _features(self, micro_batch: MicroBatch, encoder: Encoder | None = None) -> tuple[Tensor, Tensor]:
        """The features of a micro-batch's images and of its captions, in their order."""
        _, _, checkpointing = self.recipe.batch.sizes(self.group.world_size)
        encode: Encoder = encoder or self.deepspeed
        m = micro_batch
        image, text = encode(
            m.images if m.image_features is None else None, m.captions if m.text_features is None else None,
            chunk_size=self.recipe.batch.chunk_size, checkpointing=checkpointing, visible_patches=m.visible_patches,
            token_wise=self.objective.loss.token_wise, with_named=True,
        )  # fmt: skip
        return m.completed(image, text)

    @contextmanager
    def _reduction(self) -> Iterator[GradientSums | None]:
        """One gradient reduction a step instead of one a micro-batch, if the recipe asks for it."""
        if not self.recipe.batch.coalesce_reduction:
            yield None
            return
        with self.deepspeed.coalesce_grad_reduction():
            yield GradientSums(list(self.module.parameters()))

    def _backward(
        self, features: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], factor: Tensor, *, last: bool
    ) -> None:
        surrogate = sum((f * g).sum() for f, g in zip(features, gradients, strict=True)) * factor
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(surrogate, scale_wrt_gas=False)

    def _fill_queue(self, queue: FeatureQueue, batch: Batch, pairs: Pairs) -> None:
        image, text = pairs.image, pairs.text
        if self._momentum is not None:
            micro_batches = self._micro_batcher.of_pairs_alone().split(batch, self.step)
            features = [self._features(m, self._momentum) for m in micro_batches]
            # The average may overflow in bf16 where the weights did not; no later step would be finite with that queued.
            image = finite_or(torch.cat([i for i, _ in features]), pairs.image)
            text = finite_or(torch.cat([t for _, t in features]), pairs.text)
        queue.push(image, text, pairs.keys, self.group, pairs.text_valid)

    def _metrics(self, grads: ObjectiveGrads, lr: float, reason: str | None, batch: Batch, pairs: Pairs) -> StepMetrics:
        hard = 0 if batch.hard_owner is None else len(batch.hard_owner)
        norm = self.deepspeed.get_global_grad_norm()  # ZeRO-1 and 2 have read it, ZeRO-3 has copied it to the host
        total = self.recipe.batch.global_batch_size
        numbers = step_numbers(grads, self.scalars, hard, norm, total, self.group) | optimizer_report(self.deepspeed)
        numbers |= self._experts.numbers()
        if not self.objective.loss.token_wise:
            numbers |= vars(feature_statistics(pairs.image, pairs.text))
        queued = 0 if self.queue is None else self.queue.filled
        copy = HostCopy(numbers)
        return StepMetrics(self.step, lr, reason is not None, reason, queued, copy, pulse=copy)

    @torch.no_grad()
    def encode_image(self, images: Tensor, chunk_size: int | None = None) -> Tensor:
        """Unit features [b, D] of images [b, 3, S, S]. Collective under ZeRO-3: every rank calls it equally often."""
        features: Tensor = self.deepspeed(self._micro_batcher.to_device(images), None, chunk_size=chunk_size)[0]
        return features

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, chunk_size: int | None = None) -> Tensor:
        """Unit features [b, D] of tokens [b, L]. Collective under ZeRO-3: every rank calls it equally often."""
        captions = cut_captions(tokens, self.config, chunk_size, self.device)
        features: Tensor = self.deepspeed(None, captions, chunk_size=chunk_size)[1]
        return features

    def bytes_to_save(self) -> int:
        """About what `save` writes, on all ranks together."""
        return self._persistent.bytes_to_save(self.deepspeed, self.recipe.optim.name)

    def save(self, folder: Path, files: Files) -> EngineState:
        """Writes the sharded weights and optimizer below `folder`; returns the rest of the state, ready for JSON.

        Collective. `dsclip.checkpoint` wraps this with a manifest and an atomic rename: prefer it. Raises UserError for
        weights that are not finite. What can't be written is noted by `files`.
        """
        return self._persistent.save(self.deepspeed, folder, files, self.step)

    @property
    def sharding(self) -> Sharding:
        """How the state is divided."""
        return Sharding(self.group.world_size, self.ds_config["zero_optimization"]["stage"])

    def load(self, folder: Path, state: EngineState, written_by: Sharding) -> None:
        """Restores what `save` wrote, bit for bit where the sharding is the same, also in an engine that has trained on since.

        Collective; `folder` must have been verified.
        """
        self._measured = None
        self.step = state["step"]
        self._persistent.load(self.deepspeed, folder, state, None if written_by == self.sharding else written_by)

    def close(self) -> None:
        """Frees DeepSpeed's buffers and hooks; call it before `shutdown_distributed`."""
        self.deepspeed.destroy()
        self.deepspeed = None
