"""torch.compile of whole blocks and of the images' embedding, under ZeRO's hooks and over chunks.

Each tower, and each way to run a block, has a code object of its own: torch counts and limits what it has compiled a
code object. What a compiled block keeps for backward is chosen by torch's partitioner within a budget.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit, ShortenTraceback
from torch._functorch import config as functorch_config

from dsclip.errors import UserError
from dsclip.model.blocks import Block
from dsclip.model.clip import Clip
from dsclip.model.layer_major import Layer, over_chunks
from dsclip.model.towers import VisionEmbed

# A share of what everything would take. Measured with saved-tensor hooks, numbers a token, M = 4·W: 1.0 keeps 16·W, 0.5
# keeps 9·W with no product of weights computed again, 0.3 keeps 5·W with a third of them.
SELECTIVE_BUDGET = 0.5
_state = {
    "usable": True,
    "required": True,
}  # of compiled code in this process; benches, which compile towers by hand, require it
VERSIONS = 32  # of one way to run a tower's blocks: shapes, with and without gradient; text lengths soon share one


class UncompiledWarning(UserWarning):
    """Layers that should run compiled don't."""


def compile_blocks(model: Clip, backend: str = "inductor", versions: int = VERSIONS, *, required: bool = False) -> None:
    """Compiles what happens inside the blocks, and to pixels before them, a chunk at a time.

    Routed blocks run as they are: how many tokens an expert has is known when it runs. Across ZeRO-3's hooks it would not work; within a leaf it does.

    backend: of torch.compile. versions: kinds of input, for one tower's `forward`, say, after which further ones run as
    they are, with an `UncompiledWarning`. required: where torch can't compile, as on a machine without a C compiler, the first
    forward raises UserError; otherwise all run as they are, with that warning.
    """
    _state.update(usable=True, required=required)
    if isinstance(model.visual.embed, VisionEmbed):
        compile_embedding(model.visual.embed, backend, versions)
    for name, tower in (("image", model.visual), ("text", model.text)):
        compile_tower([block for block in tower.blocks if type(block) is Block], name, backend, versions)


def compile_embedding(embed: VisionEmbed, backend: str = "inductor", versions: int = VERSIONS) -> None:
    """Compiles what turns pixels into tokens: normalising, cutting, patch dropout, positions, the first norm."""
    run = _compiled(VisionEmbed.embedded, "image_embedded", 1.0, backend, versions)
    embed.embedded = MethodType(run, embed)  # type: ignore[method-assign]


def compile_tower(blocks: list[Block], name: str, backend: str = "inductor", versions: int = VERSIONS) -> None:
    """Compiles blocks of one kind, in code of their own. name: of the tower, in what torch prints."""
    plain: Callable[..., Tensor] = Block.forward.__wrapped__  # type: ignore[attr-defined]
    forward = over_chunks(_compiled(plain, f"{name}_forward", 1.0, backend, versions))
    selective = _compiled(plain, f"{name}_forward_selective", SELECTIVE_BUDGET, backend, versions)
    again = _compiled(Block.forward_again, f"{name}_forward_again", 1.0, backend, versions)
    for block in blocks:
        block.forward = MethodType(forward, block)  # type: ignore[method-assign]
        block.forward_selective = MethodType(selective, block)  # type: ignore[method-assign]
        block.forward_again = MethodType(again, block)  # type: ignore[method-assign]


def _compiled(
    function: Callable[..., Tensor], name: str, budget: float, backend: str, versions: int
) -> Callable[..., Tensor]:
    """function(layer, chunk, ...), compiled under a name of its own within the budget, for so many kinds of input."""
    code = function.__code__.replace(co_name=name)
    own = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    compile_graph: Callable[..., Any] = torch._dynamo.lookup_backend(backend)

    def within_budget(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with functorch_config.patch(activation_memory_budget=budget):
            return compile_graph(graph, inputs)

    # Of a whole graph torch says when it reaches its limit; otherwise it would run uncompiled without a word.
    run: Callable[..., Tensor] = torch.compile(own, backend=within_budget, fullgraph=True)

    def compiled_or_warned(layer: Layer, x: Tensor, *others: Tensor | None) -> Tensor:
        if not _state["usable"]:
            return function(layer, x, *others)
        # torch keeps it by thread, and on a GPU backward runs in threads of autograd's, where it would be torch's own 8.
        if torch._dynamo.config.recompile_limit != versions:
            torch._dynamo.config.recompile_limit = versions
        try:
            return run(layer, x, *others)
        except FailOnRecompileLimitHit:
            warnings.warn(
                f"{name} has been compiled for {versions} kinds of input; chunks of {tuple(x.shape)} run "
                "uncompiled, more slowly: use fewer chunk sizes, or train.compile=off",
                UncompiledWarning,
                stacklevel=2,
            )
        except ShortenTraceback as error:  # what torch's compilers raise
            cause = getattr(error, "inner_exception", error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise
            first = str(cause).strip().partition("\n")[0]
            words = f"torch.compile failed ({type(cause).__name__}: {first})"
            if _state["required"]:
                raise UserError(
                    f"train.compile=on: {words}. It needs Triton and a C compiler (gcc); install them, or set train.compile=off"
                ) from error
            _state["usable"] = False
            warnings.warn(
                f"blocks run uncompiled, more slowly and with more memory than planned: {words}; it needs Triton and a C compiler (gcc)",
                UncompiledWarning,
                stacklevel=2,
            )
        return function(layer, x, *others)

    return compiled_or_warned
