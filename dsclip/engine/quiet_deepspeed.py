"""DeepSpeed, imported with five corrections.

What it prints, how its checkpoints name an enum, what it releases and gathers, and what it compiles, and when.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

if not torch.cuda.is_available():
    # Otherwise it prints on standard output, where tools write their JSON, that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402  (after the choice of accelerator)
from deepspeed.runtime import bf16_optimizer, compiler  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import Init  # noqa: E402
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator  # noqa: E402

from dsclip.engine.flat_gather import gather_flat  # noqa: E402

# Its INFO lines and torch's repeated deprecation warnings bury what a user wants to read.
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It warns of any optimizer but its own and torch's AdamW; dsclip's are compared with float64 under every ZeRO stage.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.*|deepspeed.*")
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor|_base).*")

LOADS = "_load_legacy_checkpoint current_rank_sd[BASE_OPTIMIZER_STATE]"
torch_backend: Any = importlib.import_module("deepspeed.comm.torch")  # as an attribute, that name is torch itself

# ZeRO-1 prints the memory before and after each group of parameters, whatever `memory_breakdown` says.
bf16_optimizer.see_memory_usage = lambda *_, **__: None
# ZeRO-1 prints at every load that it loads; its other messages are for those who ask for them.
bf16_optimizer.print = lambda *args, **options: None if args[:1] == (LOADS,) else print(*args, **options)

# Its shared-memory collectives for CPUs serve inference alone, and cost a training a C++ compiler, a minute or two of
# compiling on a fresh machine and 69 MB of shared memory a rank that nothing frees.
torch_backend.build_shm_op = lambda: None

# Python 3.11.0 to 3.11.3 pickle an enum through getattr, which no checkpoint that is loaded may refer to.
ZeroStageEnum.__reduce_ex__ = lambda self, protocol: (ZeroStageEnum, (self.value,))


def _forget_releases_with_the_trace() -> None:
    """ZeRO-3 caches which weights to release after a module, by the place of the module in the trace, and for good.

    A trace without a backward (the first micro-batch of several, an evaluation of one tower) says "release all" for places
    that a later trace has too: in 0.19.8 all its weights are then gathered twice a step. The cache goes with the trace.
    """
    name = "_PartitionedParameterCoordinator__params_to_release"
    cells = getattr(PartitionedParameterCoordinator, name).__closure__ or ()
    cached = [cell.cell_contents for cell in cells if hasattr(cell.cell_contents, "cache_clear")]
    clear_trace = PartitionedParameterCoordinator._clear_trace_structures

    def clear_trace_and_releases(self: PartitionedParameterCoordinator) -> None:
        clear_trace(self)
        for function in cached:
            function.cache_clear()

    PartitionedParameterCoordinator._clear_trace_structures = clear_trace_and_releases


def _import_muon_uncompiled() -> None:
    """ZeRO imports Muon, whoever optimizes, and Muon's functions TorchInductor: 2 s of processor time of every rank's start.

    They are compiled when they are first called, as before.
    """

    def compile_when_called(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = functools.cache(lambda: compile_now()(function))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    compile_now, compiler.compile = compiler.compile, lambda: compile_when_called
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compile_now


_forget_releases_with_the_trace()
_import_muon_uncompiled()
Init._allgather_params_coalesced = gather_flat(Init._allgather_params_coalesced, deepspeed.comm.all_gather_into_tensor)

__all__ = ["deepspeed"]
