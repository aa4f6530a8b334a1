"""Run on every rank: continues a run, saving whenever nothing is under way, until one of the ranks is killed; writes its losses.

A child of the victim's kills it from outside, so that neither Python nor a call into C puts the moment off: one between the
beginning of a save and twice the time that the longest one took.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from dsclip.checkpoint import CheckpointStore, find_checkpoint, load_checkpoint
from dsclip.checkpoint.lineage import Lineage, complete_checkpoints, step_of
from dsclip.checkpoint.store import remove_unfinished
from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed
from dsclip.saving import Background
from tests.distributed.checkpoint_worker import NoTokenizer
from tests.distributed.exactness_worker import build, global_batch, local_part

OPTIONS = dict(micro_batches=1, chunks=1, patch_dropout=0.0, bf16=True)
KEPT = 2


def main(folder: str, stage: str, how: str, steps: str, victim: str, after: str, seed: str) -> None:
    """how: `at once`, `background` or, the last step alone, `end`; steps: to end with; victim: the rank that is killed, -1 none, at a
    moment of the seed's, from its `after`-th save on."""
    init_distributed()
    group, run = Collectives.current(), Path(folder)
    looks, moment = random.Random(int(seed)), random.Random(int(seed) + 1)  # looks: the same on all ranks
    if group.rank == 0:
        remove_unfinished(run / "checkpoints")
    group.barrier()
    engine = build(int(stage), **OPTIONS, group=group)
    complete = complete_checkpoints(run / "checkpoints")
    if complete:
        load_checkpoint(engine, find_checkpoint(run), world_size=group.world_size)
    size = engine.bytes_to_save() // group.world_size
    writing = Background(size, engine.device) if how == "background" else None
    lineage = Lineage(run.name, steps=tuple(map(step_of, complete)))
    store = CheckpointStore(run, keep=KEPT, tokenizer=NoTokenizer(), lineage=lineage, background=writing)
    log = (run / f"log_{group.rank}.jsonl").open("a", buffering=1)
    saves, longest_s = 0, 0.1
    while engine.step < int(steps):
        loss = engine.train_step(local_part(global_batch(engine.step), group)).loss
        log.write(json.dumps([engine.step, float.hex(loss)]) + "\n")
        if how == "end" or (store.under_way is not None and store.finish(group, wait=False) is None):
            continue
        saves += 1
        if group.rank == int(victim) and saves == int(after):
            kill_later(moment.uniform(0, 2 * longest_s))
        started = time.monotonic()
        if writing is None:
            store.save(engine, {}, {})
        else:
            store.copy(engine, {}, {})
            while looks.random() < 0.9 and store.finish(group, wait=False) is None:
                time.sleep(0.02)
        longest_s = max(longest_s, time.monotonic() - started)
    store.finish(group, wait=True)
    if store.find(engine.step) is None:
        store.save(engine, {}, {})
    store.close()
    engine.close()
    shutdown_distributed()


def kill_later(seconds: float) -> None:
    """Kills this process."""
    rank = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(rank, signal.SIGKILL)
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
