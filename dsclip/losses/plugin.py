"""Files and modules of users, which register losses and terms of their own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

from dsclip.errors import UserError


def import_plugin(plugin: str, key: str) -> None:
    """Imports a Python file (once a process) or module. key: of the recipe, for messages. Raises UserError."""
    if not plugin.endswith(".py"):
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            raise UserError(f"{key}: there is no module `{plugin}` ({error})") from error
        return
    path = Path(plugin)
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}")
    name = f"dsclip_plugin_{path.resolve()}"
    if name in sys.modules:  # what it has is registered
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{key}: Python can't import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key} {path} could not be imported: {type(error).__name__}: {error}") from error
