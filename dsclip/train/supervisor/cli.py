"""The command line of `launchers/supervise.py`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from dsclip.command_line import Parser
from dsclip.config import load_recipe
from dsclip.config.train_section import TrainSection
from dsclip.distributed import STOP_SIGNALS
from dsclip.errors import RunStopped, UserError
from dsclip.train.cli import parse_arguments
from dsclip.train.lost_reader import outlive_readers
from dsclip.train.supervisor.job import Job
from dsclip.train.supervisor.journal import Journal, Record, is_done, last_step
from dsclip.train.supervisor.policy import Decision, Policy

TRAINER = "train.py"
EXAMPLE = """example:
  python launchers/supervise.py -- deepspeed launchers/train.py --ds_config ds_configs/zero3_bf16.json --config recipe.yaml

exit codes: 0 the run is done, 2 wrong input, 75 stopped by a signal and saved, otherwise that of the last launch"""


def main(argv: list[str] | None = None) -> None:
    """Supervises, and ends the process with a code that says how it went."""
    arguments = parse(argv)
    outlive_readers()
    try:
        sys.exit(supervise(arguments))
    except UserError as error:
        say(str(error))
        sys.exit(error.exit_code)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options, and after `--` the command."""
    made = Parser(
        description="Starts a training command again after a crash, until its run is done.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--crashes-a-day", type=int, default=50, help="more of them end it (default: 50)")
    made.add_argument("--crashes-a-step", type=int, default=3, help="so many in a row at one step end it (default: 3)")
    made.add_argument(
        "--grace", type=float, default=300.0, metavar="SECONDS",
        help="for ranks to save in when they are stopped or lost their launcher (default: 300)",
    )  # fmt: skip
    made.add_argument("command", nargs="+", metavar="COMMAND", help="after --: a launcher and launchers/train.py")
    return made.parse_args(argv)


def supervise(arguments: argparse.Namespace) -> int:
    """Launches until the run is done or given up; the exit code. Raises UserError for a command that can't be supervised."""
    for name in ("crashes_a_day", "crashes_a_step", "grace"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name):g} and must be above 0")
    command, train = resuming(arguments.command)
    run_dir = Path(train.output) / train.name
    journal, policy = Journal(run_dir), Policy(arguments.crashes_a_day, arguments.crashes_a_step)
    stop = Stop()
    while True:
        journal.begin(time.time())
        try:
            job = Job(command)
        except OSError as error:
            raise UserError(f"{command[0]} can't be started ({error.strerror}); give a command after --") from error
        code = job.wait(stop.asked, arguments.grace)
        step = last_step(run_dir)
        decision = policy.after(code, step, time.time(), done=is_done(run_dir, train.steps))
        if stop.asked():
            decision = Decision(None, f"the supervisor was stopped after step {step}")
        record = journal.end(time.time(), exit_code=code, step=step, decision=decision.why)
        if decision.delay_s is None:
            say(f"{decision.why}. {summary(record)}")
            if stop.asked() and code:
                return RunStopped.exit_code
            return code if code >= 0 else 128 - code  # as shells do with signals
        say(f"launch {record['launches']}: {decision.why}; the next one in {decision.delay_s:.0f} s")
        stop.wait(decision.delay_s)
        if stop.asked():
            return RunStopped.exit_code


def resuming(command: list[str]) -> tuple[list[str], TrainSection]:
    """(the command with `--resume auto`, the recipe's section on its run). Raises UserError."""
    place = next((i for i, word in enumerate(command) if Path(word).name == TRAINER), None)
    if place is None:
        raise UserError(
            f"the command doesn't call launchers/{TRAINER}: {' '.join(command)}. Give it after --, with its launcher"
        )
    given = parse_arguments(command[place + 1 :])
    if not any(word.partition("=")[0] == "--resume" for word in command[place + 1 :]):
        command, given.resume = [*command, "--resume", "auto"], "auto"
    if given.dry_run:
        raise UserError("--dry-run trains nothing; call it without the supervisor")
    if given.resume != "auto":
        raise UserError(
            f"--resume {given.resume} would begin there again after each crash. Start it so once by hand, then supervise it "
            "with --resume auto"
        )
    return command, load_recipe(given.config or "demo", given.overrides).train


class Stop:
    """Whether this process was asked to stop, by one of STOP_SIGNALS."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._event.set()

    def asked(self) -> bool:
        """Whether it was."""
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        """Until then, or until it is asked."""
        self._event.wait(seconds)


def summary(record: Record) -> str:
    """One line for people."""
    return (
        f"{record['launches']} launches, {record['restarts']} restarts: {record['useful_seconds']:.0f} s of "
        f"{record['wall_seconds']:.0f} s made steps that count, an effective training time ratio of {record['ettr']:.1%}"
    )


def say(text: str) -> None:
    """A line for people, on standard error."""
    print(f"dsclip supervise: {text}", file=sys.stderr, flush=True)
