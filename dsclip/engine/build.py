"""Puts a model under DeepSpeed: process group, construction under zero.Init, leaf modules, optimizer."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsclip.config.schema import OptimSection
from dsclip.distributed import Collectives, launched_ranks
from dsclip.engine.cpu_bf16 import speed_up_bf16
from dsclip.engine.quiet_deepspeed import deepspeed
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig, Layer
from dsclip.optim.build import build_optimizer
from dsclip.saving import Files


def init_distributed(timeout_minutes: float = 30) -> torch.device:
    """Joins the ranks of the job (gloo on CPU, NCCL on CUDA) and returns this rank's device. Safe to call twice."""
    _, _, local_rank = launched_ranks()
    speed_up_bf16()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        _address_of_a_single_process()
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timedelta(minutes=timeout_minutes))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def _address_of_a_single_process() -> None:
    """Plain `python launchers/train.py` has no launcher that sets the rendezvous; one rank needs none."""
    _, world_size, _ = launched_ranks()
    if world_size > 1:
        return
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for key, value in address.items():
        os.environ.setdefault(key, value)


def build_model(
    config: ClipConfig, ds_config: dict[str, Any], seed: int, state_dict: dict[str, Tensor] | None = None
) -> Clip:
    """The model in the engine's dtype. Collective.

    state_dict: weights to start from, on rank 0; what the others give isn't looked at (their buffers stay, see `ExpertBalance`). Under ZeRO-3 a rank holds one
    module at a time beside its shards, and rank 0 the state_dict; under ZeRO-1 and 2 `initialize` broadcasts rank 0's.
    """
    torch.manual_seed(seed)
    given = Collectives.current().broadcast_object(state_dict is not None)
    with constructing(ds_config):
        model = Clip(config)
    if ds_config["zero_optimization"]["stage"] < 3:
        if state_dict is not None:
            model.load_state_dict(state_dict)
        return model
    if given:
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if state_dict is not None and dist.get_rank() == 0:
                    parameter.copy_(state_dict[name])
        if state_dict is not None:
            for name, buffer in model.named_buffers():
                buffer.copy_(state_dict[name])
    return model


def constructing(ds_config: dict[str, Any]) -> AbstractContextManager[Any]:
    """Within it modules of an engine's model are built: under ZeRO-3 each is sharded as soon as its constructor is done."""
    if ds_config["zero_optimization"]["stage"] < 3:
        return nullcontext()
    # By default DeepSpeed would put a function of its own in the place of torch's linear, for good: it saves its inputs after the
    # product, so that what is run again for backward can't stop before it.
    zero = ds_config["zero_optimization"] | {"memory_efficient_linear": False}
    sharding: AbstractContextManager[Any] = deepspeed.zero.Init(
        config_dict_or_path=ds_config | {"zero_optimization": zero}
    )
    return sharding


def initialize(model: Clip, ds_config: dict[str, Any], optim: OptimSection) -> deepspeed.DeepSpeedEngine:
    """The DeepSpeed engine around the model, with every layer a ZeRO-3 leaf module."""
    if ds_config["zero_optimization"]["stage"] == 3:
        deepspeed.utils.set_z3_leaf_modules(model, [Layer])
    optimizer = build_optimizer(model, optim)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config, dist_init_required=False)
    if dist.get_world_size() == 1 and type(engine.optimizer).__name__ == "BF16_Optimizer":  # ZeRO-1 in bf16
        # DeepSpeed would flatten, "reduce" and copy back all gradients of a single rank: a quarter of a ViT-B/32 step.
        engine.enable_backward_allreduce = False
    _refuse_backward_without_forward(engine)
    return engine


@contextmanager
def saving_through(engine: deepspeed.DeepSpeedEngine, files: Files) -> Iterator[None]:
    """Within it DeepSpeed gives what it saves to `files`, and drops no scripts for users to run: `tools/convert_hf.py` does their work
    after verification."""
    engine.checkpoint_engine.save = lambda state_dict, path: files.torch(state_dict, Path(path))
    engine._copy_recovery_script = lambda save_path: None
    try:
        yield
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script


def _refuse_backward_without_forward(engine: deepspeed.DeepSpeedEngine) -> None:
    """Two backwards after one forward lose gradients silently in DeepSpeed 0.19.8: 0.42 times the norm was measured."""
    original, state = engine.backward, {"forward": False}

    def note_forward(*_: object) -> None:
        state["forward"] |= torch.is_grad_enabled()

    def backward(*args: Any, **kwargs: Any) -> Any:
        if not state["forward"] and not engine.inside_no_sync_ctxt:
            raise UserError(
                "backward was called twice after one forward; DeepSpeed would silently lose gradients. Call the engine's "
                "forward before each backward, or do both within engine.coalesce_grad_reduction()"
            )
        state["forward"] = False
        return original(*args, **kwargs)

    engine.register_forward_pre_hook(note_forward)
    engine.backward = backward
