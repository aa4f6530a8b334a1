"""Layer-major accumulation: a stage's weights are fetched once, then every chunk of the batch goes through it.

Under ZeRO-3 a stage is a leaf module: its weights are gathered before `forward` and once more before the backward of
its outputs. With the chunks inside the stage, the number of gathers and of gradient reductions does not depend on how
finely the batch is cut. DESIGN.md §1 has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Chunks = tuple[Tensor, ...]  # DeepSpeed hooks modules that return tensors or tuples of them, nothing else


class Stage(nn.Module):
    """A part of a tower that maps one chunk to one chunk; `forward` maps a tuple of chunks to a tuple of chunks.

    Subclasses define `compute(chunk, *context)`. A context is a tuple with one tensor a chunk, without gradient
    (the kept patches, the end tokens). Chunks may differ in shape.
    """

    def compute(self, chunk: Tensor, *context: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} is a Stage without a compute method")

    def forward(self, recompute: bool, contexts: tuple[Chunks, ...], anchor: Tensor | None, *chunks: Tensor) -> Chunks:
        """Every chunk through this stage. With `recompute`, only the chunks themselves are kept for backward.

        The chunks are positional: torch's backward hooks, through which DeepSpeed reduces a leaf module's gradients,
        see no tensor within a tuple. anchor: for a first stage, whose chunks have no gradient, see `backward_anchor`.
        """
        columns = list(zip(*contexts, strict=True)) if contexts else [()] * len(chunks)
        params = [p for p in self.parameters() if p.requires_grad]
        no_graph = not torch.is_grad_enabled() or not (params or any(c.requires_grad for c in chunks))
        if no_graph or (len(chunks) == 1 and not recompute and anchor is None):
            return tuple(self.compute(chunk, *context) for chunk, context in zip(chunks, columns, strict=True))
        return _LayerMajor.apply(self, recompute, columns, len(chunks), *chunks, anchor, *params)


def backward_anchor(device: torch.device) -> Tensor | None:
    """An input with gradient for a stage that reads pixels or token ids.

    A leaf module none of whose inputs has a gradient is reduced by DeepSpeed before its gradients exist: they would be
    zero, silently.
    """
    return torch.zeros(1, device=device, requires_grad=True) if torch.is_grad_enabled() else None


class _LayerMajor(torch.autograd.Function):
    """All chunks through one stage, with the parameter gradients summed in float32 and returned once."""

    @staticmethod
    def forward(ctx, stage, recompute, columns, n_chunks, *tensors):
        chunks = tensors[:n_chunks]
        ctx.stage, ctx.columns, ctx.recompute, ctx.anchor = stage, columns, recompute, tensors[n_chunks]
        # The parameters are not saved here: ZeRO-3 swaps their storage, and gathers them again before backward.
        ctx.save_for_backward(*chunks)
        if recompute:
            with torch.no_grad():
                return tuple(stage.compute(chunk, *context) for chunk, context in zip(chunks, columns, strict=True))
        with torch.enable_grad():
            ctx.graphs = [_run(stage, chunk, context) for chunk, context in zip(chunks, columns, strict=True)]
        return tuple(output.detach() for _, output in ctx.graphs)

    @staticmethod
    def backward(ctx, *output_grads):
        params = [p for p in ctx.stage.parameters() if p.requires_grad]
        totals: list[Tensor | None] = [None] * len(params)
        chunk_grads = []
        for index, chunk in enumerate(ctx.saved_tensors):
            if ctx.recompute:
                with torch.enable_grad():
                    leaf, output = _run(ctx.stage, chunk, ctx.columns[index])
            else:
                leaf, output = ctx.graphs[index]
                ctx.graphs[index] = None  # frees this chunk's activations before the next one is differentiated
            inputs = [leaf, *params] if leaf.requires_grad else params
            grads = list(torch.autograd.grad(output, inputs, output_grads[index]))
            chunk_grads.append(grads.pop(0) if leaf.requires_grad else None)
            _add_in_float32(totals, grads)
        param_grads = [total.to(p.dtype) for total, p in zip(totals, params, strict=True)]
        anchor_grad = None if ctx.anchor is None else torch.zeros_like(ctx.anchor)
        return None, None, None, None, *chunk_grads, anchor_grad, *param_grads


def _run(stage: Stage, chunk: Tensor, context: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    leaf = chunk.detach().requires_grad_(chunk.requires_grad)
    return leaf, stage.compute(leaf, *context)


def _add_in_float32(totals: list[Tensor | None], grads: list[Tensor]) -> None:
    for i, grad in enumerate(grads):
        if totals[i] is None:
            totals[i] = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            totals[i].add_(grad)
