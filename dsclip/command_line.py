"""What every tool's command line has in common: `--json`, one sentence for a wrong input, exit codes 0, 1 and 2."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable

from dsclip.errors import UserError


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose help ends with an example; it has `--json`."""
    made = argparse.ArgumentParser(
        description=description,
        epilog=f"example:\n  {example}\n\nexit codes: 0 done, 1 failed, 2 wrong input",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output, all else on standard error"
    )
    return made


def run_tool(tool: Callable[[argparse.Namespace], tuple[dict, str]], arguments: argparse.Namespace) -> int:
    """Calls the tool, prints its (result, text for people), and returns the exit code."""
    try:
        result, text = tool(arguments)
    except UserError as error:
        print(f"dsclip: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dsclip: interrupted", file=sys.stderr)
        return 130
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(f"dsclip: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Exception:
        print(f"dsclip failed:\n{traceback.format_exc()}", file=sys.stderr)
        return 1
    print(json.dumps(result) if arguments.json else text)
    return 0


def say(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr, flush=True)
