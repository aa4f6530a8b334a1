"""dsclip: contrastive image-text training at scale, on the exact loss of the whole global batch."""

from pathlib import Path
from typing import Any

from dsclip import embedded

__version__ = "0.1.0"
__all__ = ["ContrastiveEngine", "create_model", "data", "losses"]

_HOMES = {"create_model": "dsclip.create", "ContrastiveEngine": "dsclip.engine.contrastive"}


def __getattr__(name: str) -> Any:
    # Imported on first use: `import dsclip` stays instant and free of side effects.
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"dsclip.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _demo() -> Path:
    from dsclip.datasets.demo import demo_folder

    return demo_folder()


embedded.FOLDERS["demo"] = _demo
