"""One phase in this process. `python -m dsclip.bench.gpu.worker PHASE JSON`: a line of JSON for each row as it is measured."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the launcher does; before torch allocates

from dsclip.bench.gpu.row import Row, Settings
from dsclip.distributed import shutdown_distributed


def main(phase: str, settings: str) -> None:
    """Prints {"row": …} or {"facts": …} a line."""
    module = importlib.import_module(f"dsclip.bench.gpu.phases.{phase}")
    for found in module.measure(Settings(**json.loads(settings))):
        line = {"row": asdict(found)} if isinstance(found, Row) else {"facts": found}
        print(json.dumps(line), flush=True)
    shutdown_distributed()


if __name__ == "__main__":
    main(*sys.argv[1:])
