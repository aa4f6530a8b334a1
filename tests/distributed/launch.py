"""Starts a worker script on several real ranks (torchrun, gloo on CPU) and reports what went wrong."""

import os
import signal
import subprocess
import sys
from pathlib import Path

WORKERS = Path(__file__).parent
REPOSITORY = WORKERS.parent.parent


def run_ranks(script: Path, world_size: int, *args, timeout_s: int = 300) -> subprocess.CompletedProcess:
    """Runs `script` under torchrun on `world_size` ranks; raises with its output when it fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    done = run_command([*command, str(script), *map(str, args)], timeout_s=timeout_s)
    if done.returncode:
        raise AssertionError(
            f"{script.name} on {world_size} ranks exited with {done.returncode}\n{done.stdout[-6000:]}"
        )
    return done


def run_command(command: list[str], *, timeout_s: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command from the repository's root on one thread a rank; its two output streams in one."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} | environment
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), env.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=REPOSITORY,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher's ranks outlive it otherwise
        output = process.communicate()[0]
        raise AssertionError(f"{' '.join(command)} took longer than {timeout_s} s\n{output[-6000:]}") from error
    return subprocess.CompletedProcess(command, process.returncode, output, None)
