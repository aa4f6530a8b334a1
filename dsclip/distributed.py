"""Every collective dsclip calls itself, in one place, and the end of a distributed run."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import re
import signal
import sys
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
# What SLURM says of a task of a step.
OF_A_TASK = (
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID", "SLURM_STEP_ID",
)  # fmt: skip
COMPARING_S = 1800.0  # for the slowest rank to come; as long as a collective may take
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

    def hand_in(self, word: str, subject: str) -> None:
        """This rank's word on the subject, once; the one before, on another subject, is forgotten."""
        if self.world_size > 1:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"dsclip/handed in/{self.rank}", word)
            store.add(f"dsclip/handed in/{subject}", 1)

    def handed_in(self, word: str | None, subject: str) -> list[str] | None:
        """Each rank's word on the subject, in rank order, once all ranks have handed theirs in. For one rank to look, whenever it likes;
        no device is read, and nobody waits. word: this rank's.
        """
        if self.world_size == 1:
            return None if word is None else [word]
        store = dist.distributed_c10d._get_default_store()
        if store.add(f"dsclip/handed in/{subject}", 0) < self.world_size:
            return None
        return [store.get(f"dsclip/handed in/{rank}").decode() for rank in range(self.world_size)]

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
    said = {name: environment.get(name, "") for name in OF_A_TASK}
    rank, local_rank, node, nodes, per_node, job, step = said.values()
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]
    try:
        on_node = _tasks_of_nodes(per_node)[int(node)]
        step_number = int(job) * 101 + int(step)
    except (ValueError, IndexError):
        on_node = step_number = 0
    if not (on_node and first and rank.isdigit() and local_rank.isdigit()):
        shown = ", ".join(f"{name} is {value or 'not set'}" for name, value in said.items())
        raise UserError(
            f"srun started this process as one of {tasks} tasks, but its rank can't be told from SLURM's variables: {shown}. Set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or start the ranks with `srun --ntasks-per-node 1 torchrun`"
        )
    # With a device bound to each task (--gpus-per-task) a task sees its own alone, as number 0.
    bound = re.fullmatch(r"\d+|(GPU|MIG)-[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")) is not None
    found = {
        "RANK": rank,
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": "0" if bound else local_rank,
        "LOCAL_WORLD_SIZE": str(on_node),
    }
    # The same on all ranks, another for each step, and below the ports that systems hand out (32768).
    address = {"MASTER_ADDR": first, "MASTER_PORT": str(10000 + step_number % 20000)}
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


def check_one_job(group: Collectives, settings: str = "") -> None:
    """Raises UserError, on all ranks, when they were started with different arguments or settings: they are no ranks of one job.

    Tasks of one `srun` that were meant to be independent would be joined without a word. Every rank calls it once the process
    group is there; no device is used. settings: as this rank read them, for a file of that name may be another one elsewhere.
    """
    words = group.meet(json.dumps([_comparable(sys.argv[1:]), settings.splitlines()]), COMPARING_S)
    if words is None:
        raise UserError(f"some of the {group.world_size} ranks never said how they were started; start the job again")
    first, *others = map(json.loads, words)
    for rank, other in enumerate(others, 1):
        for what, ours, theirs in zip(("was started with", "read the setting"), first, other, strict=True):
            if ours != theirs:
                # Rank 0 holds the store: it must not end before the others have read.
                with contextlib.suppress(RuntimeError):
                    group.meet("compared", 60.0)
                raise UserError(
                    f"rank 0 {what} {_first_difference(ours, theirs)} and rank {rank} {_first_difference(theirs, ours)}: ranks of one job have "
                    "the same. If they are independent tasks of one srun, start each with `env -u SLURM_STEP_NUM_TASKS python ...`"
                )


def _comparable(arguments: list[str]) -> list[str]:
    """Without what DeepSpeed numbers its ranks with, and overrides sorted: their order says nothing."""
    arguments = [word for word in arguments if not re.match("--local[-_]rank", word)]
    overrides = [word for word in arguments if re.match(r"[\w.]+=", word)]
    return [word for word in arguments if word not in overrides] + sorted(overrides)


def _first_difference(ours: list[str], theirs: list[str]) -> str:
    """The first of our words that differs from theirs, and the option that it belongs to."""
    place = next(i for i, (a, b) in enumerate(itertools.zip_longest(ours, theirs)) if a != b)
    start = place - 1 if place and ours[place - 1].startswith("-") else place
    return f"`{' '.join(ours[start : place + 1]).strip()}`" if place < len(ours) else "nothing more"


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
