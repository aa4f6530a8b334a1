"""Run on every rank: starts runs that are refused, one after the other in the same ranks, each as a dry run too; writes what was said."""

import json
import sys
import traceback
from pathlib import Path

from dsclip.distributed import Collectives, shutdown_distributed
from dsclip.engine.build import init_distributed
from dsclip.errors import UserError
from dsclip.train.cli import parse_arguments
from dsclip.train.run import run


def said(arguments: list[str]) -> str:
    """The sentence that ends a run with these arguments, or what else happens."""
    try:
        run(parse_arguments(arguments))
    except UserError as error:
        return str(error)
    except Exception:
        return traceback.format_exc()
    return "accepted"


def main(out: str, cases: str) -> None:
    init_distributed()
    group, found = Collectives.current(), {}
    for case, arguments in json.loads(Path(cases).read_text()).items():
        found[case] = {
            "run": group.all_gather_object(said(arguments)),
            "dry run": group.all_gather_object(said([*arguments, "--dry-run"])),
        }
    if group.rank == 0:
        Path(out).write_text(json.dumps(found))
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
