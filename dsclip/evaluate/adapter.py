"""Models of other frameworks: three functions of the user's, `--model adapter:MODULE:FUNCTION`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dsclip.errors import UserError
from dsclip.files import sha256

ADAPTER = "adapter:"
USAGE = "FUNCTION must return three functions: preprocess(PIL image) -> tensor, encode_image(batch) -> [n, d], encode_text(texts) -> [n, d]"


@dataclass(frozen=True)
class Adapter:
    """preprocess: an RGB picture to a tensor, of one shape for all; encode_image: [n, ...] of these to features [n, d]; encode_text: n texts to [n, d].

    Features may have any length and be on any device.
    """

    preprocess: Callable[[Image.Image], Tensor]
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[list[str]], Tensor]
    blank_size = 224  # of the black picture that stands for one that can't be decoded

    def prepared(self, image: Image.Image) -> Tensor:
        """What preprocess made. Raises UserError when that is no tensor."""
        made = self.preprocess(image)
        if not isinstance(made, Tensor):
            raise UserError(f"the adapter's preprocess returned {type(made).__name__}, and must return a tensor")
        return made

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features [n, d], float32 in host memory."""
        with torch.inference_mode():
            return _unit(self.encode_image(images), len(images), "encode_image")

    def text_features(self, texts: list[str]) -> Tensor:
        """Unit features [n, d], float32 in host memory."""
        with torch.inference_mode():
            return _unit(self.encode_text(texts), len(texts), "encode_text")


def _unit(features: Any, n: int, function: str) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != n:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(f"the adapter's {function} returned {shape} for {n} inputs, and must return features [{n}, d]")
    # A copy, since tensors of inference mode can't be used in what follows.
    return F.normalize(features.float(), dim=-1).cpu().clone()


def load_adapter(spec: str) -> tuple[Adapter, str]:
    """(the functions, SHA-256 of the module's file) of `adapter:MODULE:FUNCTION`, MODULE a name or the path of a .py file.

    Raises UserError for what isn't there, or doesn't return three functions.
    """
    place, separator, name = spec.removeprefix(ADAPTER).rpartition(":")
    if not separator or not place or not name:
        raise UserError(f"--model {spec}: write adapter:MODULE:FUNCTION; {USAGE}")
    module = _import(place)
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--model {spec}: {place} has no function {name}")
    found = function()
    functions = tuple(found) if isinstance(found, tuple | list) else ()
    if len(functions) != 3 or not all(callable(f) for f in functions):
        raise UserError(f"--model {spec}: {name} returned something else; {USAGE}")
    file = inspect.getsourcefile(module)
    return Adapter(*functions), sha256(Path(file)) if file else ""


def _import(place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UserError(
                f"adapter: there is no module {error.name}; give its name, or the path of a .py file"
            ) from error
    path = Path(place)
    if not path.is_file():
        raise UserError(f"adapter: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"adapter: {path} can't be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
