"""Sets of the HuggingFace library `datasets`, from the hub, a folder of parquet files, or one that `save_to_disk` wrote.

Named `datasets:NAME`, with a configuration `datasets:NAME@CONFIGURATION`; no code of a set is ever run, which that library refuses itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsclip.data.layouts.caption_table import CAPTION_COLUMNS
from dsclip.data.layouts.files import FileSet
from dsclip.data.layouts.hf_compositional import compositional_columns, compositional_layout
from dsclip.data.layouts.rows import FileLayout, Row
from dsclip.errors import NoSuchSplit, UserError

PREFIX = "datasets:"
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
Choose = Callable[[list[str], str | None, object], str]  # (splits, asked for, what of) to the split


def holds_hf_dataset(folder: str) -> bool:
    """Whether a folder is one that `save_to_disk` wrote, a set's repository of parquet files, or the library's own cache of a set (`OWNER___NAME`)."""
    path = Path(folder)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return True
    deep = ("*/*/*/*.arrow",) if "___" in path.name else ()  # of other folders, a look so deep would list all images
    return any(next(path.glob(pattern), None) is not None for pattern in ("*.parquet", "data/*.parquet", *deep))


class DatasetImages(FileSet):
    """The encoded images of a split, in one or several columns, each of images or of lists of them; see `image_name`."""

    def __init__(self, spec: str, images: Any, names: list[str]):
        self.path, self._images, self.names = Path(spec), images, names
        self._lock = threading.Lock()  # its formatting of rows isn't said to be safe

    def read(self, name: str) -> bytes:
        """Raises OSError for an image that is a path to a file that isn't there, or is no image at all."""
        row, column, item = (*map(int, name.removesuffix(".jpg").split("/")), 0, 0)[:3]
        with self._lock:
            value = self._images[row][self._images.column_names[column]]
        if isinstance(value, list):
            value = value[item] if item < len(value) else None
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
    if found := compositional_columns(table.column_names, images):
        layout = compositional_layout(table, image_name, spec)
        names = list(dict.fromkeys(row.name for row in layout.rows))
        return replace(layout, split=split, files=DatasetImages(spec, _encoded(table, found), names))
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
        Row(image_name(i), _texts(text), label)
        for i, (text, label) in enumerate(zip(of_caption, map(_label, of_label), strict=True))
    ]
    classes = (
        table.features[labels].names if labels and isinstance(table.features[labels], datasets.ClassLabel) else None
    )
    files = DatasetImages(spec, _encoded(table, [images]), [row.name for row in rows])
    return FileLayout(classes, None, split, files, rows)


def image_name(row: int, column: int = 0, item: int = 0) -> str:
    """What an image is called: its row, and if they aren't the first, which of the columns of images and which of the list in it.

    With an extension that its bytes needn't be of.
    """
    return f"{row}/{column}/{item}.jpg" if item else f"{row}/{column}.jpg" if column else f"{row}.jpg"


def _encoded(table: Any, columns: list[str]) -> Any:
    """These columns alone, with images as bytes or paths."""
    import datasets

    encoded, undecoded = table.select_columns(columns), datasets.Image(decode=False)
    for column in columns:
        lists = not isinstance(table.features[column], datasets.Image)
        encoded = encoded.cast_column(column, datasets.List(undecoded) if lists else undecoded)
    return encoded


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
