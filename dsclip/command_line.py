"""What every tool's command line has in common: `--json`, one sentence for a wrong input, exit codes 0, 1 and 2."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from dsclip.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """With --json among its arguments, what is wrong with them is said in JSON too. Options are never abbreviated."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; `error` needs to know what was given."""
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints usage and message, and ends the process with exit code 2."""
        if unknown := next(iter(re.findall(r"unrecognized arguments: (--[\w-]+)", message)), None):
            message += did_you_mean(
                unknown, [option for option in self._option_string_actions if option.startswith("--")]
            )
        if "--json" in self._given:
            print_error(message, 2)
        super().error(message)


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example; it has `--json`."""
    made = Parser(
        description=description,
        epilog=f"example:\n  {example}\n\nexit codes: 0 done, 1 failed, 2 wrong input",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, all else on standard error"
    )
    return made


def run_tool(tool: Callable[[argparse.Namespace], tuple[dict[str, Any], str]], arguments: argparse.Namespace) -> int:
    """Calls the tool, prints its (result, text for people), and returns the exit code.

    With --json an error is an object too: {"error": the sentence, "exit_code": 1, 2 or 130}.
    """
    try:
        result, text = tool(arguments)
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, as_json=arguments.json)
    try:
        print(json.dumps(result) if arguments.json else text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def report_error(error: BaseException, *, as_json: bool) -> int:
    """Says what went wrong, on standard error and, if asked, as JSON on standard output; returns the exit code."""
    if isinstance(error, UserError):
        message, code = str(error), error.exit_code
    elif isinstance(
        error, FileExistsError | FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError
    ):
        message, code = f"{error.filename or ''}: {error.strerror or error}", 2
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", 130
    else:
        message, code = f"{type(error).__name__}: {error}", 1
    unforeseen = code == 1 and not isinstance(error, UserError)
    say(f"dsclip failed:\n{''.join(traceback.format_exception(error))}" if unforeseen else f"dsclip: {message}")
    if as_json:
        print_error(message, code)
    return code


def print_error(message: str, exit_code: int) -> None:
    """An error as a JSON object on standard output."""
    print(json.dumps({"error": message, "exit_code": exit_code}), flush=True)


def say(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """`42s`, `3m07s`, `5h12m`, `3d04h`."""
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
