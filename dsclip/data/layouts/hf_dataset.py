"""Sets of the HuggingFace library `datasets`, from the hub, a folder of parquet files, or one that `save_to_disk` wrote.

Named `datasets:NAME`, with a configuration `datasets:NAME@CONFIGURATION`; no code of a set is ever run, which that library refuses itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsclip.data.layouts.caption_table import CAPTION_COLUMNS
from dsclip.data.layouts.files import FileSet
from dsclip.data.layouts.rows import FileLayout, Row
from dsclip.errors import NoSuchSplit, UserError

PREFIX = "datasets:"
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
Choose = Callable[[list[str], str | None, object], str]  # (splits, asked for, what of) to the split


class DatasetImages(FileSet):
    """The encoded images of a split; an image's name is its number, with an extension that its bytes needn't be of."""

    def __init__(self, spec: str, images: Any, column: str):
        self.path, self._images, self._column = Path(spec), images, column
        self._lock = threading.Lock()  # its formatting of rows isn't said to be safe
        self.names = [f"{i}.jpg" for i in range(len(images))]

    def read(self, name: str) -> bytes:
        """Raises OSError for an image that is a path to a file that isn't there, or is no image at all."""
        with self._lock:
            value = self._images[int(name.partition(".")[0])][self._column]
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            raise OSError(f"{self.path}: row {name} has no image")
        return value["bytes"] or Path(value["path"]).read_bytes()

    def root(self) -> str:
        """The library's own fingerprint of the split: images of all splits have the same names."""
        return str(self._images._fingerprint)  # noqa: SLF001 (it has no public name)

    def state(self, names: list[str]) -> list[object]:
        """The library's own fingerprint of the split."""
        return [str(self.path), self.root()]


def open_hf_dataset(spec: str, split: str | None, caption_column: str | None, choose: Choose) -> FileLayout:
    """The set of `datasets:…`; columns by the names that such sets have. Raises UserError, also where `datasets` isn't installed."""
    table, split = _split_of(_opened(spec), split, spec, choose)
    import datasets

    images = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    images = images or next((name for name in IMAGE_COLUMNS if name in table.features), None)
    if images is None:
        raise UserError(f"{spec} has no column of images; it has {', '.join(table.column_names)}")
    captions = [name for name in (caption_column, *CAPTION_COLUMNS, "sentences", "raw") if name in table.features]
    labels = next((name for name in LABEL_COLUMNS if name in table.features), None)
    if not captions and labels is None:
        raise UserError(
            f"{spec} has neither captions nor labels ({', '.join(table.column_names)}); name the column of captions (--caption-key)"
        )
    of_caption = table[captions[0]] if captions else [[]] * len(table)
    of_label = table[labels] if labels else [None] * len(table)
    rows = [
        Row(f"{i}.jpg", _texts(text), label)
        for i, (text, label) in enumerate(zip(of_caption, map(_label, of_label), strict=True))
    ]
    classes = (
        table.features[labels].names if labels and isinstance(table.features[labels], datasets.ClassLabel) else None
    )
    encoded = table.select_columns([images]).cast_column(images, datasets.Image(decode=False))
    return FileLayout(classes, None, split, DatasetImages(spec, encoded, images), rows)


def _opened(spec: str) -> Any:
    """A dictionary of splits, or one split."""
    name, _, configuration = spec.removeprefix(PREFIX).partition("@")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{spec} needs the package datasets: pip install 'dsclip[datasets]'") from None
    datasets.disable_progress_bars()
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:  # its own errors are of these kinds
        raise UserError(f"{spec} can't be opened: {str(error).splitlines()[0]}") from error


def _split_of(found: Any, asked: str | None, spec: str, choose: Choose) -> tuple[Any, str | None]:
    if not isinstance(found, dict):
        if asked is not None:
            raise NoSuchSplit(f"{spec} has no splits to choose {asked!r} from")
        return found, None
    splits = list(found)
    split = splits[0] if asked is None and len(splits) == 1 else choose(splits, asked, spec)
    return found[split], split


def _texts(value: object) -> list[str]:
    """One caption, or several; also of records with a text, as COCO's are stored."""
    values = value if isinstance(value, list | tuple) else [value]
    texts = [v.get("raw", v.get("text")) if isinstance(v, dict) else v for v in values]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _label(value: object) -> int | None:
    """None where a test set keeps its labels to itself, which such sets say with −1."""
    return value if isinstance(value, int) and value >= 0 else None
