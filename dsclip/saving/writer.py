"""The process that writes a rank's part of checkpoints: `python -m dsclip.saving.writer HANDLE`, started by `Background`.

It reads orders from its standard input and answers on its standard output, a line of JSON each. It sees no GPU. It ends with the rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsclip.saving.commit import commit, remove_folders
from dsclip.saving.files import WriteNow, as_checkpoints_are_saved, write_tensors
from dsclip.saving.hashed_file import FileEntry, HashedFile, write_hashed
from dsclip.saving.shared_memory import Mapped

PR_SET_PDEATHSIG = 1
NICE = 5  # what trains has the cores first


def main(handle: int, rank: int) -> None:
    """Obeys until the rank closes the pipe. rank: its process."""
    answers, sys.stdout = sys.stdout, sys.stderr
    # What would write on after its rank could meet the next launch in the same folder.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:
        return
    with contextlib.suppress(OSError):
        os.nice(NICE)
    memory = Mapped(handle)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps({"number": order["number"], **obey(memory, order)}), file=answers, flush=True)


def obey(memory: Mapped, order: dict[str, Any]) -> dict[str, Any]:
    """The answer to an order: to `allot` bytes of the memory, `write` files, `commit` a folder or `remove` some."""
    if "allot" in order:
        with contextlib.suppress(OSError):  # which the rank meets too
            memory.allot(order["allot"])
        return {}
    if "remove" in order:
        remove_folders(order["remove"])
        return {}
    if "commit" in order:
        return commit(order["commit"])._asdict()
    started, files = time.monotonic(), WriteNow()
    for job in order["write"]:
        path = Path(job["path"])
        files.attempt(path, partial(write, memory, job, path))
    entries, problem, _ = files.written()
    return {"entries": entries, "problem": problem, "seconds": time.monotonic() - started}


def write(memory: Mapped, job: dict[str, Any], path: Path) -> FileEntry:
    """One file. Raises OSError."""
    if job["kind"] == "text":
        return write_hashed(path, lambda file: file.write(job["content"].encode()))
    if job["kind"] == "tensors":
        tensors = {}
        for record in job["records"]:
            numbers = torch.empty(0, dtype=torch.uint8)
            if record["size"]:
                numbers.set_(memory.at(record["place"], record["size"]))
            tensors[record["name"]] = numbers.view(getattr(torch, record["dtype"])).view(record["shape"])
        return write_tensors(tensors, path, job["metadata"])
    return write_hashed(path, partial(write_records, memory, job["records"]))


def write_records(memory: Mapped, records: list[dict[str, Any]], file: HashedFile) -> None:
    """As `torch.save` ends: its own writer, and the records in their order."""
    with as_checkpoints_are_saved(), torch.serialization._open_zipfile_writer(file) as archive:  # type: ignore[arg-type]
        for record in records:
            size = record["size"]
            content = memory.at(record["place"], size) if size else b""
            archive.write_record(record["name"], content, size)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
