"""Run on every rank: saves, resumes and reads back checkpoints of each ZeRO stage; writes one JSON file."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param

from dsclip.checkpoint import (
    CheckpointStore,
    NotSaved,
    complete_checkpoints,
    find_checkpoint,
    load_checkpoint,
    read_checkpoint,
    read_manifest,
)
from dsclip.config.schema import LossSection
from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed
from dsclip.errors import UserError
from dsclip.saving import Background
from tests.distributed.exactness_worker import build, global_batch, local_part

# Full after the second step, used from the third: the checkpoint falls in between its first uses.
QUEUE = LossSection(queue_size=24, queue_momentum=0.9)


class NoTokenizer:
    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


def losses(engine, group, steps) -> list[str]:
    return [float.hex(engine.train_step(local_part(global_batch(s), group)).loss) for s in range(engine.step, steps)]


def refusal(engine, folder: Path) -> str:
    """What is said when the checkpoint of a run of another kind is continued with this engine, which is closed then."""
    try:
        load_checkpoint(engine, find_checkpoint(folder), world_size=Collectives.current().world_size)
        return "loaded"
    except UserError as error:
        return str(error)
    finally:
        engine.close()


def resume_case(
    stage: int,
    bf16: bool,
    folder: Path,
    group: Collectives,
    loss: LossSection,
    background: Background,
    *,
    first_of_all: bool,
) -> dict:
    """Three steps, a checkpoint in the background and three more, in the same engine and in a fresh one.

    first_of_all: also compared with six steps without a checkpoint, and saved again and again until old ones go.
    """
    special = None if stage == 3 and bf16 else "experts"
    options = dict(micro_batches=2, chunks=2, patch_dropout=0.5, bf16=bf16, group=group, loss=loss, special=special)
    first = build(stage, **options)
    begun = losses(first, group, 3)
    store = CheckpointStore(folder, keep=2, tokenizer=NoTokenizer())
    at_once = read_manifest(store.save(first, {"position": group.rank}, {}))["files"]
    weights = {n: safe_get_full_fp32_param(p).cpu().clone() for n, p in first.module.named_parameters()}
    weights |= {n: balance.float() for n, balance in first.module.named_buffers()}
    scale = first.scalars.scale
    later = CheckpointStore(folder / "copied", keep=2, tokenizer=NoTokenizer(), background=background)
    if first_of_all:
        stopped_case(first, later, group, background)
    later.copy(first, {"position": group.rank}, {})
    finished = later.finish(group, wait=False)
    under_way = finished is None
    expected = begun + losses(first, group, 6)  # of which the copy knows nothing
    while finished is None:
        finished = later.finish(group, wait=False)
        time.sleep(0.01)
    first.close()

    second = build(stage, **options)
    manifest = load_checkpoint(second, finished[0], world_size=group.world_size)
    seen = begun + losses(second, group, 6)
    load_checkpoint(second, find_checkpoint(folder), world_size=group.world_size)  # in place, as a run that goes back
    again = losses(second, group, 6)
    result = {
        "kind": "resume",
        "stage": stage,
        "bf16": bf16,
        "queue": loss.queue_size,
        "expected": expected,
        "seen": seen,
        "again": again,
        "data": manifest["data"],
        "same_files": manifest["files"] == at_once,
        "under_way": under_way,
    }
    if group.rank == 0:
        read = read_checkpoint(folder)
        result["weights_equal"] = all(torch.equal(read.state_dict[n], weights[n]) for n in weights)
        result["names_equal"] = set(read.state_dict) == set(weights)
        result["scale_equal"] = read.logit_scale == scale
    group.barrier()
    if first_of_all:
        for _ in range(2):
            store.save(second, {}, {})
            losses(second, group, second.step + 1)
        store.save(second, {}, {})
        result["kept"] = sorted(p.name for p in store.folder.iterdir())
    second.close()
    if first_of_all:
        undisturbed = build(stage, **options)
        result["undisturbed"] = losses(undisturbed, group, 6)
        undisturbed.close()
    return result


def stopped_case(engine, store: CheckpointStore, group: Collectives, background: Background) -> None:
    """The process of rank 1 stands still, then dies: no part is a checkpoint before all are, and all ranks are told the same."""
    process = background._process
    if group.rank == 1:
        os.kill(process.pid, signal.SIGSTOP)
    store.copy(engine, {"position": group.rank}, {})
    for _ in range(20):
        assert store.finish(group, wait=False) is None and not complete_checkpoints(store.folder)
        time.sleep(0.02)
    if group.rank == 1:
        process.kill()
    try:
        store.finish(group, wait=True)
        raise AssertionError("a part is missing")
    except NotSaved as error:
        assert re.match(
            r"the process that writes it \(\d+\) was killed by SIGKILL. The newest checkpoint is none", str(error)
        ), error
    group.barrier()
    assert store.under_way is None and not list(store.folder.iterdir())


def main(out: str, folder: str) -> None:
    init_distributed()
    group = Collectives.current()
    results = []
    background = Background(1 << 20, torch.device("cpu"))
    for stage in (1, 2, 3):
        for bf16 in (False, True):
            where, alone = Path(folder) / f"{stage}-{bf16}", stage == 3 and bf16
            results.append(resume_case(stage, bf16, where, group, LossSection(), background, first_of_all=alone))
    for stage in (1, 3):
        where = Path(folder) / f"{stage}-queue"
        results.append(resume_case(stage, True, where, group, QUEUE, background, first_of_all=False))
    background.close()
    if group.rank == 0:
        Path(out).write_text(json.dumps(results))
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
