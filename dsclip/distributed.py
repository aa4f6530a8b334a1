"""Every collective dsclip calls itself, in one place, and the end of a distributed run."""

from __future__ import annotations

import gc
import itertools
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dsclip.errors import UserError

T = TypeVar("T")
_meetings = itertools.count()  # of this process group; the same on all ranks
_decisions = itertools.count()
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # that ask a run to stop: its ranks agree and save
DECISIONS_KEPT = 1000  # steps that rank 0's host may be ahead of another rank's: collectives allow fewer


@dataclass(frozen=True)
class Collectives:
    """The ranks that share one global batch. With one rank nothing is communicated.

    in_ring: features of other ranks come one rank at a time (`losses.blocks`), not all at once.
    """

    rank: int = 0
    world_size: int = 1
    in_ring: bool = False

    @staticmethod
    def single() -> Collectives:
        """One process on its own."""
        return Collectives()

    @staticmethod
    def current() -> Collectives:
        """All ranks of the running job, or a single one when there is no process group."""
        if not dist.is_initialized():
            return Collectives()
        return Collectives(dist.get_rank(), dist.get_world_size())

    def all_gather(self, x: Tensor) -> Tensor:
        """x [n, ...] of every rank, concatenated in rank order to [world_size·n, ...]. Shapes must be equal."""
        if self.world_size == 1:
            return x
        whole = torch.empty((self.world_size * len(x), *x.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(whole, x.contiguous())
        return whole

    def pass_on(self, sent: list[Tensor], received: list[Tensor]) -> Callable[[], None]:
        """Starts to send `sent` to the next rank and to receive into `received` from the one before; what it returns waits.

        In a ring of all ranks; contiguous tensors, with the same shapes and dtypes everywhere. Neither may be written before
        the wait, and `received` not be read.
        """
        following, before = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
        operations = []
        for tag, (out, into) in enumerate(zip(sent, received, strict=True)):
            if out.numel():
                operations.append(dist.P2POp(dist.isend, out, following, tag=tag))
                operations.append(dist.P2POp(dist.irecv, into, before, tag=tag))
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """The first sent[0] numbers of x [sum of sent] go to rank 0, the next to rank 1; what came, [sum of received], by rank."""
        if self.world_size == 1:
            return x.clone()
        arrived = x.new_empty(sum(received))
        dist.all_to_all_single(arrived, x.contiguous(), received, sent)
        return arrived

    def all_gather_object(self, x: T) -> list[T]:
        """The object of every rank, in rank order."""
        if self.world_size == 1:
            return [x]
        objects: list[T] = [x] * self.world_size
        dist.all_gather_object(objects, x)
        return objects

    def broadcast_object(self, x: T) -> T:
        """Rank 0's object, on every rank."""
        if self.world_size == 1:
            return x
        holder = [x]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor that is bit-identical everywhere."""
        x = x.clone()
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def meet(self, word: str, timeout_s: float) -> list[str] | None:
        """What each rank says, in rank order, once all ranks come here; None when some don't within the time.

        Unlike a collective it may be called while other ranks hang in one. All ranks that come call it equally often.
        """
        if self.world_size == 1:
            return [word]
        store, number = dist.distributed_c10d._get_default_store(), next(_meetings)
        keys = [f"dsclip/meeting/{number}/{rank}" for rank in range(self.world_size)]
        store.set(keys[self.rank], word)
        try:
            store.wait(keys, timedelta(seconds=timeout_s))
        except RuntimeError:  # torch's DistStoreError
            return None
        return [store.get(key).decode() for key in keys]

    def decide(self, word: str | None, subject: str) -> str | None:
        """A word that some rank has had on the subject, by rank 0's choice; None while none had. The same on all ranks.

        Through the launcher's store: no device is read, and no rank waits for another than rank 0. What another rank says
        may count only the next time. All ranks call it equally often.
        """
        if self.world_size == 1:
            return word
        store, number = dist.distributed_c10d._get_default_store(), next(_decisions)
        if word is not None:
            store.set(f"dsclip/word/{subject}", word)
        if self.rank == 0:
            key = f"dsclip/word/{subject}"
            decision = store.get(key).decode() if store.check([key]) else ""
            store.set(f"dsclip/decision/{number}", decision)
            store.delete_key(f"dsclip/decision/{number - DECISIONS_KEPT}")
        else:
            decision = store.get(f"dsclip/decision/{number}").decode()
        return decision or None

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.world_size > 1:
            dist.barrier()


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set (RANK, MASTER_ADDR, ...) for a task of `srun python launchers/train.py`; else empty.

    Only where no launcher set RANK and the step has several tasks: a batch script or an interactive shell is none. Rank 0
    is on the step's first node; a MASTER_ADDR or MASTER_PORT that is set stays. The variables are those of
    srun(1), "output environment variables". Raises UserError when one of them is missing.
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or tasks == "1":
        return {}
    try:
        rank, local_rank, node = (environment[f"SLURM_{name}"] for name in ("PROCID", "LOCALID", "NODEID"))
        first = re.sub(r"\[(\w+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"]).partition(",")[0]
        on_node = _tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[int(node)]
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"srun started this process as one of {tasks} tasks, but what SLURM says of them can't be read ({error!r}); set RANK, WORLD_SIZE, "
            "LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start the ranks with `srun --ntasks-per-node 1 torchrun`"
        ) from None
    # With a device bound to each task (--gpus-per-task) a task sees its own alone, as number 0.
    bound = re.fullmatch(r"\d+|(GPU|MIG)-[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")) is not None
    found = {
        "RANK": rank,
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": "0" if bound else local_rank,
        "LOCAL_WORLD_SIZE": str(on_node),
    }
    # The same on all ranks, another for each step, and below the ports that systems hand out (32768).
    address = {"MASTER_ADDR": first, "MASTER_PORT": str(10000 + (job * 101 + step) % 20000)}
    return found | {name: environment.get(name, value) for name, value in address.items()}


def _tasks_of_nodes(text: str) -> list[int]:
    """SLURM's `2(x3),1` is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts


def take_slurm_ranks() -> None:
    """Makes a task of srun a rank, as a launcher would have; to be called before anything reads RANK. See `slurm_ranks`."""
    os.environ.update(slurm_ranks(os.environ))


def launched_ranks() -> tuple[int, int, int]:
    """(rank, world size, local rank) that deepspeed, torchrun, accelerate or plain python gave this process.

    Raises UserError when they are no numbers.
    """
    values = []
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(default))
        if not re.fullmatch(r"\d{1,9}", text) or (name == "WORLD_SIZE" and int(text) == 0):
            raise UserError(
                f"the environment variable {name} is {text!r} and must be a number; a launcher sets it (deepspeed, torchrun, accelerate), "
                "and without one it must not be set"
            )
        values.append(int(text))
    rank, world_size, local_rank = values
    return rank, world_size, local_rank


def shutdown_distributed() -> None:
    """Ends the process group so that the process also exits cleanly.

    gloo's worker threads abort the interpreter at exit in about a third of correct runs (pytorch#190489) when work
    objects outlive the group; collecting them before the last barrier avoids it.
    """
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
