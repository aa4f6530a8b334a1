"""The command line of tools/verify_checkpoint.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dsclip.checkpoint.lineage import complete_checkpoints
from dsclip.checkpoint.manifest import MANIFEST, read_manifest, verify
from dsclip.command_line import parser, run_tool, say
from dsclip.errors import RunFailed, UserError

EXAMPLE = "python tools/verify_checkpoint.py runs/demo"


def main(argv: list[str] | None = None) -> None:
    """tools/verify_checkpoint.py."""
    p = parser(
        "Compares every file of checkpoints with its manifest: size, SHA-256, and that pickled files hold nothing that runs code.",
        EXAMPLE,
    )
    p.add_argument("paths", metavar="PATH", type=Path, nargs="+", help="a checkpoint, or a run for all that it holds")
    sys.exit(run_tool(verify_all, p.parse_args(argv)))


def verify_all(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"checkpoints": [{"path", "step", "files", "bytes"}]}, all of which are whole. Raises UserError when there is none, RunFailed
    that names each damaged one."""
    checkpoints = [found for path in arguments.paths for found in _meant(path)]
    whole, damaged = [], []
    for number, path in enumerate(checkpoints, start=1):
        size = sum(entry["bytes"] for entry in read_manifest(path)["files"].values())
        say(f"{number} of {len(checkpoints)}: {path}, {size / 1e9:.3g} GB")
        try:
            whole.append(_described(path))
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        good = f"Whole: {', '.join(row['path'] for row in whole) or 'none'}"
        raise RunFailed(f"{' '.join(damaged)} {good}.")
    lines = [
        f"{row['path']}: step {row['step']}, {row['files']} files, {row['bytes'] / 1e9:.3g} GB, whole" for row in whole
    ]
    return {"checkpoints": whole}, "\n".join(lines)


def _meant(path: Path) -> list[Path]:
    if (path / MANIFEST).is_file():
        return [path]
    if path.is_dir() and (found := complete_checkpoints(path) or complete_checkpoints(path / "checkpoints")):
        return found
    raise UserError(
        f"{path} is no checkpoint and holds none; give one such as runs/NAME/checkpoints/step_00001000, or runs/NAME"
    )


def _described(path: Path) -> dict[str, Any]:
    """Raises UserError when it is damaged."""
    manifest = verify(path)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    return {"path": str(path), "step": manifest["step"], "files": len(manifest["files"]), "bytes": size}
