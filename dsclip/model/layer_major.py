"""Layer-major accumulation: a layer's weights are fetched once, then every chunk of the micro-batch goes through it.

Under ZeRO-3 a layer is a leaf module: its weights are gathered before its forward and once more before the backward of
its outputs. With the chunks inside the layer, the number of gathers and of gradient reductions does not depend on how
finely the batch is cut. docs/how_it_works.md has a figure and the measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsclip.model.host_memory import HostLine

Chunks = tuple[Tensor, ...]  # DeepSpeed hooks modules that return tensors or tuples of them, nothing else
Graph = tuple[Tensor, Tensor]  # a chunk as the leaf of a graph of its own, and the layer's output at the graph's end
T = TypeVar("T")


@dataclass(frozen=True)
class ChunkedPass:
    """How chunks go through a layer.

    checkpointing: what is saved of each chunk for backward. none: everything; selective: see `Layer.forward_selective`;
    full: the chunk alone; offload: the chunk, in host memory. contexts: what `forward` takes beside a chunk, each a
    tuple with one tensor a chunk, without gradient (the visible patches, the end tokens). host: of the tower's pass.
    """

    checkpointing: str = "none"
    contexts: tuple[Chunks, ...] = ()
    host: HostLine = field(default_factory=HostLine)


class Layer(nn.Module):
    """A part of a tower (embedding, block or head), and a leaf module under ZeRO-3.

    Subclasses define `forward(chunk, *context)` of one chunk, under `over_chunks`. Called with a chunk alone, a layer is
    an ordinary module; towers call `layer(dummy, *chunks, chunked=ChunkedPass(...))` and get all chunks back.
    """

    def forward_selective(self, chunk: Tensor, *context: Tensor) -> Tensor:
        """`forward` that saves for backward what is dear to compute and cheap to hold."""
        output: Tensor = self.forward(chunk, *context)
        return output

    def forward_again(self, chunk: Tensor, *context: Tensor) -> Tensor:
        """`forward` for the sake of its graph: the numbers of its output may be anything."""
        output: Tensor = self.forward(chunk, *context)
        return output


def over_chunks(forward: Callable[..., Tensor]) -> Callable[..., Tensor | Chunks]:
    """Lets the forward of one chunk take all chunks, in any number and of any shape, in one call of the layer.

    The chunks are positional: torch's backward hooks, through which DeepSpeed reduces a leaf module's gradients, see no
    tensor within a tuple. The first argument is then a `dummy_input` for a layer whose chunks have no gradient, or None.
    """

    @wraps(forward)
    def run(self: Layer, *inputs: Any, chunked: ChunkedPass | None = None) -> Tensor | Chunks:
        if chunked is None:
            return forward(self, *inputs)
        dummy, *chunks = inputs
        contexts = list(zip(*chunked.contexts, strict=True)) if chunked.contexts else [()] * len(chunks)
        params = [p for p in self.parameters() if p.requires_grad]
        no_graph = not torch.is_grad_enabled() or not (params or any(c.requires_grad for c in chunks))
        if no_graph or (len(chunks) == 1 and chunked.checkpointing == "none" and dummy is None):
            return tuple(forward(self, chunk, *context) for chunk, context in zip(chunks, contexts, strict=True))
        run_all: Callable[..., Chunks] = _LayerMajor.apply
        return run_all(self, chunked, contexts, len(chunks), *chunks, dummy, *params)

    return run


def dummy_input(device: torch.device) -> Tensor | None:
    """An input with gradient for a layer that reads pixels or token ids; None where no graph is built.

    A leaf module none of whose inputs has a gradient is reduced by DeepSpeed before its gradients exist: they would be
    zero, silently.
    """
    return torch.zeros(1, device=device, requires_grad=True) if torch.is_grad_enabled() else None


class _LayerMajor(torch.autograd.Function):
    """All chunks through one layer, with the parameter gradients summed in float32 and returned once."""

    @staticmethod
    def forward(
        ctx: Any, layer: Layer, chunked: ChunkedPass, contexts: list[Chunks], n_chunks: int, *tensors: Tensor
    ) -> Chunks:
        ctx.layer, ctx.dummy = layer, tensors[n_chunks]
        inputs = [(chunk, *context) for chunk, context in zip(tensors[:n_chunks], contexts, strict=True)]
        if chunked.checkpointing in ("none", "selective"):
            run = layer.forward if chunked.checkpointing == "none" else layer.forward_selective
            ctx.graphs = [_graph(run, each, ctx.needs_input_grad[4 + i]) for i, each in enumerate(inputs)]
            return tuple(output.detach() for _, output in ctx.graphs)
        ctx.graphs = None
        if chunked.checkpointing == "offload":
            ctx.on_host = chunked.host.send(inputs)
        else:
            ctx.save_for_backward(
                *tensors[:n_chunks], *(tensor for each in zip(*contexts, strict=True) for tensor in each)
            )
        return tuple(layer.forward(*each) for each in inputs)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> tuple[Tensor | None, ...]:
        # Under ZeRO-3 the parameters' storage was released and gathered again since forward; the tensors are the same.
        params = [p for p in ctx.layer.parameters() if p.requires_grad]
        saved = ctx.saved_tensors
        sums: list[Tensor] = []
        chunk_grads: list[Tensor | None] = []
        for index, output_grad in enumerate(output_grads):
            leaf, output = _LayerMajor._graph_of(ctx, index, saved[index :: len(output_grads)])
            inputs = [leaf, *params] if leaf.requires_grad else params
            grads = list(torch.autograd.grad(output, inputs, output_grad))
            chunk_grads.append(grads.pop(0) if leaf.requires_grad else None)
            del leaf, output, inputs
            if len(output_grads) == 1:
                sums = [_dense(grad) if grad.is_sparse else grad for grad in grads]
            elif index == 0:
                sums = [_first_of_a_sum(grad) for grad in grads]
            else:
                for i, grad in enumerate(grads):  # one at a time: a narrow sum goes as its wide one comes
                    sums[i] = _add_in_float32(sums[i], grad)
        param_grads = [total.to(p.dtype) for total, p in zip(sums, params, strict=True)]
        dummy_grad = None if ctx.dummy is None else torch.zeros_like(ctx.dummy)
        return None, None, None, None, *chunk_grads, dummy_grad, *param_grads

    @staticmethod
    def _graph_of(ctx: Any, index: int, saved: Chunks) -> Graph:
        """The graph of one chunk, once: nothing else holds it, so that it is freed before the next is differentiated."""
        if ctx.graphs is not None:
            graph: Graph = ctx.graphs[index]
            ctx.graphs[index] = None
            return graph
        inputs = saved or ctx.on_host[index].back()
        return _graph(ctx.layer.forward_again, inputs, ctx.needs_input_grad[4 + index])


def _graph(run: Callable[..., Tensor], inputs: Chunks, needs_grad: bool) -> Graph:
    """run(chunk, *context) with a graph; inputs: the chunk and its context."""
    leaf = inputs[0].detach().requires_grad_(needs_grad)
    with torch.enable_grad():
        return leaf, run(leaf, *inputs[1:])


def recomputed(function: Callable[..., T], *inputs: Tensor) -> T:
    """function(*inputs), of which the inputs alone are saved; backward runs it again, up to the last product it needs.

    No random state is saved: nothing in a layer draws random numbers.
    """
    output: T = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output


def _first_of_a_sum(grad: Tensor) -> Tensor:
    """A dense gradient as it is, widened when the next one is added; of a sparse one the dense sum of its rows."""
    if not grad.is_sparse:
        return grad
    return _add_in_float32(torch.zeros(grad.shape, dtype=_wide(grad), device=grad.device), grad)


def _add_in_float32(total: Tensor, grad: Tensor) -> Tensor:
    """total + grad, in place once the total is wide."""
    total = total.to(_wide(grad))
    if grad.is_sparse:
        return total.index_add_(0, grad._indices()[0], grad._values().to(total.dtype))
    return total.add_(grad)


def _dense(grad: Tensor) -> Tensor:
    """A sparse gradient as a dense one in its dtype, with the values of equal rows added up in float32."""
    rows, place = grad._indices()[0].unique(return_inverse=True)
    values = grad._values().to(_wide(grad))
    sums = values.new_zeros(len(rows), *grad.shape[1:]).index_add_(0, place, values)
    return torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device).index_copy_(0, rows, sums.to(grad.dtype))


def _wide(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)
