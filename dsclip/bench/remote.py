"""How the loader starts and keeps up when shards are far: a loopback server that answers late. `python -m dsclip.bench.remote JSON`."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import resource
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsclip.bench.measure import environment, in_process
from dsclip.command_line import say
from dsclip.config.data_section import DataSection
from dsclip.data import ShardWriter, build_loader, load_tokenizer, resolve_shards
from dsclip.errors import UserError

SHARDS, SHARD_SIZE, PICTURES = (
    8,
    1000,
    64,
)  # of the set that is written where none is given: 8,000 samples of about 25 KB
LATE = 3.0  # a batch that takes so many times the median is a stall


def bench_remote(shards: str | None, **settings: Any) -> tuple[dict[str, Any], str]:
    """{"first_batch_seconds", "stalls", ...} of shards behind a loopback server that waits before each answer and connection.

    settings: latency_ms, batch, workers, batches, image_size, tokenizer, shuffle_unit, read_ahead_mb. stalls: batches after the first
    that took more than 3 times the median; waited_share: of the workers' time, for bytes.
    """
    for name in ("batch", "batches", "image_size"):
        if settings[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {settings[name]}; it must be at least 1")
    if min(settings["latency_ms"], settings["workers"], settings["read_ahead_mb"]) < 0:
        raise UserError("--latency-ms, --workers and --read-ahead-mb must not be negative")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shards is None:
            say(f"writing {SHARDS} shards of {SHARD_SIZE} samples")
            write_pictures(folder)
        else:
            folder = Path(resolve_shards(shards)[0]).parent
            if not (folder / "manifest.json").is_file():
                raise UserError(f"{folder} has no manifest; write one with tools/index_shards.py {folder}")
        with late_server(folder, settings["latency_ms"]) as host:
            found = in_process("dsclip.bench.remote", settings | {"host": host})
    result = {**found, **settings, "environment": environment()}
    text = (
        f"first batch after {found['first_batch_seconds']:.2f} s, then {found['batch_seconds']['median']:.2f} s a batch (longest "
        f"{found['batch_seconds']['longest']:.2f} s, {found['stalls']} stalls); workers waited {found['waited_share']:.0%} of their time "
        f"and took {found['peak_worker_mb']:.0f} MB at most"
    )
    return result, text


def measure(host: str, batch: int, workers: int, batches: int, image_size: int, tokenizer: str, shuffle_unit: int | None,
            read_ahead_mb: int, latency_ms: float) -> dict[str, Any]:  # fmt: skip
    """From building the loader to its last batch, taken as fast as they come."""
    words = load_tokenizer(tokenizer)
    data = DataSection(
        train_shards=f"http://{host}", workers=workers, trusted_hosts=[host], shuffle_unit=shuffle_unit,
        read_ahead_mb=read_ahead_mb,
    )  # fmt: skip
    started = time.perf_counter()
    loader = iter(
        build_loader(data, tokenizer=words, image_size=image_size, context_length=77, global_batch_size=batch, seed=0)
    )
    times, working, waited = [], 0.0, 0.0
    for _ in range(batches):
        batch_report = next(loader).report
        times.append(time.perf_counter() - started)
        working, waited = working + batch_report.seconds, waited + batch_report.waited
    del loader
    gc.collect()  # ends the workers, whose memory is known then
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)] or [0.0]
    median = statistics.median(gaps)
    return {
        "first_batch_seconds": times[0], "batch_seconds": {"median": median, "longest": max(gaps)},
        "stalls": sum(gap > LATE * median for gap in gaps), "samples_per_second": batch * (len(gaps)) / max(sum(gaps), 1e-9),
        "waited_share": waited / max(working, 1e-9),
        "peak_worker_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
    }  # fmt: skip


def write_pictures(folder: Path) -> None:
    """A set of which every 64th picture is the same: the bench reads bytes, it doesn't learn."""
    pictures = []
    for seed in range(PICTURES):
        coarse = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(content, "JPEG", quality=95)
        pictures.append(content.getvalue())
    with ShardWriter(folder, SHARD_SIZE) as writer:
        for i in range(SHARDS * SHARD_SIZE):
            writer.write(
                f"{i:06d}", {"jpg": pictures[i % PICTURES], "txt": f"a picture of many colours, number {i}".encode()}
            )


@contextmanager
def late_server(folder: Path, latency_ms: float) -> Iterator[str]:
    """Serves a folder from a process of its own; gives "127.0.0.1:port"."""
    command = [
        sys.executable,
        "-c",
        "import sys; from dsclip.bench.remote import serve; serve(sys.argv[1], float(sys.argv[2]))",
    ]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    server = subprocess.Popen([*command, str(folder), str(latency_ms)], stdout=subprocess.PIPE, text=True, env=env)
    if server.stdout is None:
        raise RuntimeError("the server prints its port into a pipe")
    try:
        yield f"127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.terminate()
        server.wait()


def serve(folder: str, latency_ms: float) -> None:
    """Prints its port and answers range requests until it is ended."""
    server = _Server(Path(folder), latency_ms / 1000)
    print(server.server_address[1], flush=True)
    server.serve_forever()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, folder: Path, latency_s: float):
        self.folder, self.latency_s = folder, latency_s
        super().__init__(("127.0.0.1", 0), _Late)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: workers that end break their connections off."""


class _Late(socketserver.BaseRequestHandler):
    """Requests of one connection. http.server takes ten times as long for one, of the cores that are measured."""

    server: _Server

    def handle(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        time.sleep(self.server.latency_s)  # a connection takes a round trip of its own
        while asked := self.request.recv(1 << 16):
            time.sleep(self.server.latency_s)
            _, path, _ = asked.split(b" ", 2)
            path = self.server.folder / Path(path.decode()).name
            if not path.is_file():
                self.request.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            found = re.search(rb"bytes=(\d+)-(\d+)", asked)
            if not found:  # HEAD
                self.request.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {path.stat().st_size}\r\n\r\n".encode())
                continue
            first, last = int(found[1]), int(found[2])
            length = min(last + 1, path.stat().st_size) - first
            self.request.sendall(f"HTTP/1.1 206 Partial Content\r\nContent-Length: {length}\r\n\r\n".encode())
            with path.open("rb") as stream:
                self.request.sendfile(stream, first, length)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
