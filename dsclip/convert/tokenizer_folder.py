"""A model's tokenizer, written beside its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dsclip.convert.folder import write_json

CONFIG = "tokenizer_config.json"


def write_tokenizer(source: Path, folder: Path, context_length: int, **settings: object) -> None:
    """Copies a tokenizer's files into the folder, and says there how many tokens the model takes.

    Without that, `truncation=True` cuts nothing in transformers. settings: more of tokenizer_config.json. The files and the
    folder get the permissions of new ones, not those of the source, which may be a private temporary folder.
    """
    folder.mkdir(exist_ok=True)
    for file in source.rglob("*"):
        place = folder / file.relative_to(source)
        if file.is_dir():
            place.mkdir(exist_ok=True)
        else:
            shutil.copyfile(file, place)
    path = folder / CONFIG
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, said | {"model_max_length": context_length} | settings)
