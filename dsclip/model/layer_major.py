"""Layer-major accumulation: a stage's weights are fetched once, then every chunk of the batch goes through it.

Under ZeRO-3 a stage is a leaf module: its weights are gathered before `forward` and once more before the backward of
its outputs. With the chunks inside the stage, the number of gathers and of gradient reductions does not depend on how
finely the batch is cut. docs/how_it_works.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Chunks = tuple[Tensor, ...]  # DeepSpeed hooks modules that return tensors or tuples of them, nothing else


CHECKPOINTING = ("none", "selective", "full", "offload")


class Stage(nn.Module):
    """A part of a tower that maps one chunk to one chunk; `forward` maps a tuple of chunks to a tuple of chunks.

    Subclasses define `compute(chunk, *context)`. A context is a tuple with one tensor a chunk, without gradient
    (the kept patches, the end tokens). Chunks may differ in shape.
    """

    def compute(self, chunk: Tensor, *context: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is a Stage without a compute method")

    def compute_keeping(self, chunk: Tensor, *context: Tensor) -> Tensor:
        """`compute` that keeps for backward what is dear to compute and cheap to hold; `selective` checkpointing."""
        return self.compute(chunk, *context)

    def forward(
        self, checkpointing: str, contexts: tuple[Chunks, ...], anchor: Tensor | None, *chunks: Tensor
    ) -> Chunks:
        """Every chunk through this stage. checkpointing: what is kept of it for backward.

        none: everything; selective: see `compute_keeping`; full: the chunks alone; offload: the chunks, in host memory.
        The chunks are positional: torch's backward hooks, through which DeepSpeed reduces a leaf module's gradients,
        see no tensor within a tuple. anchor: for a first stage, whose chunks have no gradient, see `backward_anchor`.
        """
        columns = list(zip(*contexts, strict=True)) if contexts else [()] * len(chunks)
        params = [p for p in self.parameters() if p.requires_grad]
        no_graph = not torch.is_grad_enabled() or not (params or any(c.requires_grad for c in chunks))
        if no_graph or (len(chunks) == 1 and checkpointing == "none" and anchor is None):
            return tuple(self.compute(chunk, *context) for chunk, context in zip(chunks, columns, strict=True))
        return _LayerMajor.apply(self, checkpointing, columns, len(chunks), *chunks, anchor, *params)


def backward_anchor(device: torch.device) -> Tensor | None:
    """An input with gradient for a stage that reads pixels or token ids.

    A leaf module none of whose inputs has a gradient is reduced by DeepSpeed before its gradients exist: they would be
    zero, silently.
    """
    return torch.zeros(1, device=device, requires_grad=True) if torch.is_grad_enabled() else None


class _LayerMajor(torch.autograd.Function):
    """All chunks through one stage, with the parameter gradients summed in float32 and returned once."""

    @staticmethod
    def forward(ctx, stage, checkpointing, columns, n_chunks, *tensors):
        ctx.stage, ctx.anchor = stage, tensors[n_chunks]
        with torch.enable_grad(), _host_memory(checkpointing, tensors[0].device):
            ctx.graphs = [
                _run(stage, checkpointing, chunk, context)
                for chunk, context in zip(tensors[:n_chunks], columns, strict=True)
            ]
        return tuple(output.detach() for _, output in ctx.graphs)

    @staticmethod
    def backward(ctx, *output_grads):
        # Under ZeRO-3 the parameters' storage was released and gathered again since forward; the tensors are the same.
        params = [p for p in ctx.stage.parameters() if p.requires_grad]
        totals: list[Tensor | None] = [None] * len(params)
        chunk_grads = []
        for index, output_grad in enumerate(output_grads):
            leaf, output = ctx.graphs[index]
            ctx.graphs[index] = None  # frees this chunk's activations before the next one is differentiated
            inputs = [leaf, *params] if leaf.requires_grad else params
            grads = list(torch.autograd.grad(output, inputs, output_grad))
            chunk_grads.append(grads.pop(0) if leaf.requires_grad else None)
            del leaf, output
            if len(output_grads) == 1:
                totals = [_dense(grad) if grad.is_sparse else grad for grad in grads]
            else:
                _add_in_float32(totals, grads)
        param_grads = [total.to(p.dtype) for total, p in zip(totals, params, strict=True)]
        anchor_grad = None if ctx.anchor is None else torch.zeros_like(ctx.anchor)
        return None, None, None, None, *chunk_grads, anchor_grad, *param_grads


def _run(stage: Stage, checkpointing: str, chunk: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    leaf = chunk.detach().requires_grad_(chunk.requires_grad)
    if checkpointing == "none":
        return leaf, stage.compute(leaf, *context)
    if checkpointing == "selective":
        return leaf, stage.compute_keeping(leaf, *context)
    return leaf, kept_inputs_only(stage.compute, leaf, *context)


def kept_inputs_only(function: Callable, *inputs: Tensor):
    """function(*inputs), of which backward keeps the inputs alone and runs it again, up to the last product it needs.

    No random state is saved: nothing in a stage draws random numbers.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def _host_memory(checkpointing: str, device: torch.device):
    """Where `offload` keeps the chunks: pinned memory beside a GPU; on a CPU they are there already."""
    if checkpointing == "offload" and device.type != "cpu":
        return torch.autograd.graph.save_on_cpu(pin_memory=True)
    return nullcontext()


def _add_in_float32(totals: list[Tensor | None], grads: list[Tensor]) -> None:
    for i, grad in enumerate(grads):
        if totals[i] is None:
            totals[i] = torch.zeros(grad.shape, dtype=_wide(grad), device=grad.device) if grad.is_sparse else grad
            if not grad.is_sparse:
                continue
        elif totals[i].dtype != _wide(grad):
            totals[i] = totals[i].to(_wide(grad))
        if grad.is_sparse:
            totals[i].index_add_(0, grad._indices()[0], grad._values().to(totals[i].dtype))
        else:
            totals[i].add_(grad)


def _dense(grad: Tensor) -> Tensor:
    """A sparse gradient as a dense one in its dtype, with the values of equal rows added up in float32."""
    rows, place = grad._indices()[0].unique(return_inverse=True)
    values = grad._values().to(_wide(grad))
    sums = values.new_zeros(len(rows), *grad.shape[1:]).index_add_(0, place, values)
    return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device).index_copy_(0, rows, sums.to(grad.dtype))


def _wide(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)
