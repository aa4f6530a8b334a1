"""Starts scripts on several real ranks, by launchers or as warm ranks (gloo on CPU), and reports what went wrong."""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO
from unittest import mock

import psutil
import torch.distributed as dist

from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed
from tests.distributed.warm_ranks import HUNG, Launch, WarmRanks

WORKERS = Path(__file__).parent
WARM = WarmRanks()
REPOSITORY = WORKERS.parent.parent
BIN = Path(sys.executable).parent
LAUNCHER_PATH = f"{BIN}:/usr/local/bin:/usr/bin:/bin"
SMALL = [
    "batch.global_batch_size=32", "model.vision_layers=2", "model.text_layers=1", "train.log_every=1", "train.steps=6",
    "optim.warmup_steps=2", "eval.max_samples=40", "eval.batch_size=20", "eval.every_steps=3", "train.save_every=3",
]  # fmt: skip


def run_ranks(script: Path, world_size: int, *args, timeout_s: int = 300) -> subprocess.CompletedProcess:
    """Runs `script` on `world_size` warm ranks; raises with its output when it fails."""
    done = warm(script, *args, ranks=world_size, timeout_s=timeout_s)
    if done.returncode:
        raise AssertionError(
            f"{script.name} on {world_size} ranks exited with {done.returncode}\n{done.stdout[-6000:]}"
        )
    return done


def warm(script: Path | str, *args, ranks: int = 2, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """Runs `script` from the repository's root on warm ranks: as under torchrun, but for its imports."""
    command = [str(script), *map(str, args)]
    with tempfile.NamedTemporaryFile("r") as output:
        code = WARM.run(Launch(command[0], command[1:], ranks, free_port(), _environment(), output.name, timeout_s))
        printed = output.read()
    if code == HUNG:
        raise AssertionError(f"{' '.join(command)} took longer than {timeout_s} s\n{printed[-6000:]}")
    return subprocess.CompletedProcess(command, code, printed, None)


def train(*arguments, ranks=2, ds_config="zero3_bf16"):
    """`launchers/train.py` on warm ranks."""
    return warm("launchers/train.py", "--ds_config", f"ds_configs/{ds_config}.json", *arguments, ranks=ranks)


def cases_of(worker: ModuleType, world_size: int, folder: Path, *, timeout_s: int = 300) -> list[dict]:
    """What the cases of a worker give on so many ranks."""
    run_ranks(Path(worker.__file__), world_size, folder / "results.json", timeout_s=timeout_s)
    return json.loads((folder / "results.json").read_text())


@contextlib.contextmanager
def alone() -> Iterator[Collectives]:
    """This process as the only rank of a job, for engines without a launcher; nothing of it is left for other tests."""
    with mock.patch.dict(os.environ, {"LOCAL_RANK": "0"}):
        _forget_groups()
        init_distributed()
        try:
            yield Collectives.current()
        finally:
            shutdown_distributed()
            _forget_groups()


def _forget_groups() -> None:
    """DeepSpeed keeps process groups in its modules' globals, also those that were destroyed."""
    if dist.is_initialized():
        return
    importlib.import_module("deepspeed.comm.comm").cdb = None  # as an attribute, that name is a function
    groups = importlib.import_module("deepspeed.utils.groups")
    for name, value in list(vars(groups).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)
        elif isinstance(value, dict) and name.endswith(("_GROUP", "_RANKS")):
            value.clear()


def write_cases(cases: Callable[[Collectives], list[dict]], out: str) -> None:
    """A worker's whole run on a rank: joins the ranks, runs the cases, writes them as JSON."""
    init_distributed()
    group = Collectives.current()
    found = cases(group)
    if group.rank == 0:
        Path(out).write_text(json.dumps(found))
    shutdown_distributed()


def run_command(command: list[str], *, timeout_s: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command from the repository's root on one thread a rank; its two output streams in one."""
    process = start(command, stdout=subprocess.PIPE, **environment)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher's ranks outlive it otherwise
        output = process.communicate()[0]
        raise AssertionError(f"{' '.join(command)} took longer than {timeout_s} s\n{output[-6000:]}") from error
    return subprocess.CompletedProcess(command, process.returncode, output, None)


def free_port() -> int:
    """A port nobody listens on: launches at the same time must not meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def deepspeed(*arguments, ranks=2, ds_config="zero3_bf16", timeout_s=240, **environment):
    """`launchers/train.py` under the `deepspeed` launcher."""
    command = under_deepspeed(arguments, ranks, ds_config)
    return run_command(command, timeout_s=timeout_s, PATH=LAUNCHER_PATH, **environment)


def deepspeed_with_a_killed_rank(*arguments, rank: int, once: Path, timeout_s=240) -> int:
    """The same on two ranks, of which one is killed as soon as a file is there; returns the launcher's exit code."""
    with _launched(arguments, once, timeout_s) as (process, _):
        rank_process(process.pid, rank).kill()
        return process.wait(timeout=timeout_s)


def deepspeed_with_a_signal(
    *arguments, to: str, once: Path, number: int = signal.SIGTERM, timeout_s=240
) -> subprocess.CompletedProcess:
    """The same, with a signal to one process as soon as a file is there: DeepSpeed's `runner`, its `launch`, or `rank K`.

    Raises when any process of the job is left after the time.
    """
    with _launched(arguments, once, timeout_s) as (process, output):
        runner = psutil.Process(process.pid)
        job = runner.children(recursive=True)
        told = {"runner": runner, "launch": job[0]}
        (told[to] if to in told else rank_process(process.pid, int(to.split()[1]))).send_signal(number)
        code = process.wait(timeout=timeout_s)
        _, left = psutil.wait_procs(job, timeout=60)
        output.seek(0)
        printed = output.read()
        assert not left, f"{left} still run after signal {number} to {to}\n{printed[-6000:]}"
        return subprocess.CompletedProcess(process.args, code, printed, None)


@contextlib.contextmanager
def _launched(arguments, once: Path, timeout_s: float) -> Iterator[tuple[subprocess.Popen, IO[str]]]:
    """`deepspeed` on two ranks that have written a file, and what they print; killed at the end."""
    with tempfile.TemporaryFile("w+") as output:
        process = start(under_deepspeed(arguments, 2, "zero3_bf16"), stdout=output, PATH=LAUNCHER_PATH)
        end = time.monotonic() + timeout_s
        try:
            while not (once.exists() and once.stat().st_size):
                if process.poll() is not None or time.monotonic() > end:
                    output.seek(0)
                    raise AssertionError(f"{once} never came\n{output.read()[-6000:]}")
                time.sleep(0.005)
            yield process, output
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(happened: Callable[[], object], process: subprocess.Popen, timeout_s: float = 240) -> None:
    """Until something has happened while a process runs."""
    end = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def rank_process(launcher: int, rank: int) -> psutil.Process:
    """A rank of a launcher's; the launcher sets RANK for ranks alone, and a rank's own workers inherit it."""
    ranks = []
    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # some helper of a library's that has just ended
            if process.environ().get("RANK") == str(rank):
                ranks.append(process)
    return min(ranks, key=lambda p: p.pid)


def under_deepspeed(arguments, ranks: int, ds_config) -> list[str]:
    """The command of `launchers/train.py` under the `deepspeed` launcher."""
    launcher = [str(BIN / "deepspeed"), f"--master_port={free_port()}", "--num_gpus", str(ranks)]
    path = ds_config if "/" in str(ds_config) else f"ds_configs/{ds_config}.json"
    return [*launcher, "launchers/train.py", "--ds_config", str(path), *map(str, arguments)]


def start(command: list[str], *, stdout: IO[str] | int, **environment: str) -> subprocess.Popen:
    """Starts a command from the repository's root on one thread a rank, in a session of its own."""
    return subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.STDOUT, text=True, env=_environment() | environment, cwd=REPOSITORY,
        start_new_session=True,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
    return env


def torchrun(*arguments, ranks=2, ds_config="zero3_bf16"):
    """`launchers/train.py` under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return run_command(
        [*launcher, "launchers/train.py", "--ds_config", f"ds_configs/{ds_config}.json", *map(str, arguments)]
    )


def accelerate(*arguments, ranks=2, options=(), ds_config="zero3_bf16"):
    """`launchers/train.py` under `accelerate launch`. options: of accelerate."""
    many = ["--multi_gpu", "--num_processes", str(ranks)] if ranks > 1 else []
    launcher = [str(BIN / "accelerate"), "launch", *many, *options]
    launcher += ["--main_process_port", str(free_port()), "--num_cpu_threads_per_process", "1"]
    return run_command(
        [*launcher, "launchers/train.py", "--ds_config", f"ds_configs/{ds_config}.json", *map(str, arguments)]
    )


def metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict]:
    """Those of them that are logged steps."""
    return [m for m in metrics(run) if "loss" in m]


def losses(run: Path) -> dict[int, float]:
    """{step: loss} of a run."""
    return {m["step"]: m["loss"] for m in steps(run)}
