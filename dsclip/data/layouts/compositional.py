"""Compositional sets in their own files: SugarCrepe, SugarCrepe++, ARO, Winoground, WinoGAViL.

A folder of JSON files, or one of them. Each is a list (or, SugarCrepe's, an object) of samples:

    SugarCrepe    add_att.json, …: {"filename", "caption", "negative_caption"}; ++ has "caption2" too (Hsieh et al. 2023; Dumpala et al. 2024)
    ARO           visual_genome_relation.json, …: {"image_path", "true_caption", "false_caption", "bbox_x", "bbox_y", "bbox_w", "bbox_h",
                  "relation_name" or "attributes"} (Yuksekgonul et al. 2023)
    ARO's orders  as its code makes them of COCO's or Flickr30k's captions: {"image", "caption_options"}, the caption and then its words in
                  other orders
    Winoground    examples.jsonl: {"image_0", "image_1", "caption_0", "caption_1", "tag"}, a line a sample (Thrush et al. 2022)
    WinoGAViL     {"cue", "candidates", "associations"}: names of images, and those of them that belong to the cue (Bitton et al. 2022)

SugarCrepe's samples are grouped by file, ARO's by relation or pair of attributes, Winoground's by tag, WinoGAViL's by cue.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from dsclip.data.layouts.files import FileSet
from dsclip.data.layouts.rows import FileLayout, Row
from dsclip.data.shards.manifest import MANIFEST
from dsclip.errors import UserError

Sample = dict[str, Any]
IMAGE_FOLDERS = ("images", "val2017", "images.zip", "val2017.zip")  # beside the JSON, or beside its folder
SMALLEST_GROUP = 25
BBOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")


def read_compositional(path: Path, images: str | None) -> FileLayout | None:
    """The set of a folder or JSON file; None for what is none. images: a folder or zip, where it is neither beside the JSON nor in its folder.

    Raises UserError for samples without the fields of their kind, for two kinds in one folder, and when the images aren't found.
    """
    contents = [(file, _samples(file)) for file in _json_files(path)]
    found = [(file, samples, kind) for file, samples in contents if samples and (kind := _kind_of(samples))]
    if not found:
        return None
    kinds = {kind for _, _, kind in found}
    if len(kinds) > 1:
        raise UserError(f"{path} holds JSON files of several kinds of sets; name one file")
    kind = kinds.pop()
    rows = [row for file, samples, _ in found for row in _rows(kind, file, samples)]
    files = _images(path, images, rows[0].name)
    present, left_out = _present(files), Counter[str]()
    if others := len(contents) - len(found):
        left_out["JSON file of another kind"] = others
    if kind is _aro:
        rows = _without_small_groups(rows)
    if kind in (_winoground, _winogavil):  # all images of a sample, or none
        rows = [_with_extension(row, present) for row in rows]
        samples = (rows[i : i + 2] for i in range(0, len(rows), 2)) if kind is _winoground else _of_cues(rows)
        kept = [row for sample in samples if all(present(row.name) for row in sample) for row in sample]
    else:
        kept = [row for row in rows if present(row.name)]
    if len(kept) < len(rows):
        left_out["missing image"] = len(rows) - len(kept)
    return FileLayout(files=files, rows=kept, left_out=left_out, pairs=kind is _winoground, cues=kind is _winogavil)


def _json_files(path: Path) -> list[Path]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.suffix in (".json", ".jsonl") and file.name != MANIFEST and file.is_file()]


def _samples(file: Path) -> list[Sample]:
    """The objects of a list, of an object, or of lines; [] for what is none of these."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content = json.loads(text)
    except (ValueError, RecursionError):
        return []
    samples = list(content.values()) if isinstance(content, dict) else content
    whole = isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples)
    return samples if whole else []


def _sugarcrepe(file: Path, sample: Sample) -> list[Row]:
    captions = [sample["caption"], *([sample["caption2"]] if "caption2" in sample else [])]
    return [Row(sample["filename"], captions, negatives=(sample["negative_caption"],), group=file.stem)]


def _aro(file: Path, sample: Sample) -> list[Row]:
    box = None
    if any(key in sample for key in BBOX):
        left, top, width, height = (int(sample[key]) for key in BBOX)
        if width < 1 or height < 1:
            raise ValueError("an empty box")
        box = (left, top, left + width, top + height)
    group = "_".join(sample["attributes"]) if "attributes" in sample else sample.get("relation_name", file.stem)
    return [Row(sample["image_path"], [sample["true_caption"]], None, (sample["false_caption"],), group, box)]


def _order(file: Path, sample: Sample) -> list[Row]:
    own, *others = sample["caption_options"]
    if not others:
        raise ValueError("no other order")
    return [Row(sample["image"], [own], None, tuple(others), file.stem)]


def _winoground(file: Path, sample: Sample) -> list[Row]:
    first, second = sample["caption_0"], sample["caption_1"]
    tag = sample.get("collapsed_tag", sample.get("tag", file.stem))
    rows = [
        Row(sample["image_0"], [first], None, (second,), tag),
        Row(sample["image_1"], [second], None, (first,), tag),
    ]
    return rows


def _winogavil(file: Path, sample: Sample) -> list[Row]:
    cue, candidates, associations = (sample[key] for key in ("cue", "candidates", "associations"))
    if not isinstance(candidates, list) or not isinstance(associations, list):
        raise ValueError(f"candidates and associations of {cue!r} must be lists")
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"a candidate of {cue!r} stands twice")
    if not associations or not set(associations) <= set(candidates):
        raise ValueError(f"the associations of {cue!r} must be among its candidates, one at least")
    return [Row(name, [cue], int(name in associations), group=file.stem) for name in candidates]


def _of_cues(rows: list[Row]) -> Iterator[list[Row]]:
    return (list(of_cue) for _, of_cue in groupby(rows, key=lambda row: row.group))


Kind = Callable[[Path, Sample], list[Row]]
KINDS: tuple[tuple[frozenset[str], Kind], ...] = (
    (frozenset({"filename", "caption", "negative_caption"}), _sugarcrepe),
    (frozenset({"image_path", "true_caption", "false_caption"}), _aro),
    (frozenset({"image", "caption_options"}), _order),
    (frozenset({"cue", "candidates", "associations"}), _winogavil),
    (frozenset({"image_0", "image_1", "caption_0", "caption_1"}), _winoground),
)


def _kind_of(samples: list[Sample]) -> Kind | None:
    return next((kind for keys, kind in KINDS if keys <= samples[0].keys()), None)


def _rows(kind: Kind, file: Path, samples: list[Sample]) -> list[Row]:
    rows = []
    for number, sample in enumerate(samples):
        try:
            of_sample = kind(file, sample)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: sample {number} is damaged ({type(error).__name__}: {error})") from error
        for row in of_sample:
            texts = (row.name, *row.captions, *row.negatives, row.group)
            if not all(isinstance(text, str) and text.strip() for text in texts) or ".." in row.name.split("/"):
                raise UserError(f"{file}: sample {number} is damaged: its image and captions must be words")
        if kind is _winogavil:
            of_sample = [row._replace(group=f"{file.stem} {number}") for row in of_sample]
        rows += of_sample
    return rows


def _images(path: Path, given: str | None, example: str) -> FileSet | Path:
    """Where the images lie: what was given, or the first place near the JSON that has the example."""
    folder = path if path.is_dir() else path.parent
    places = [folder, *(place / name for place in (folder, folder.parent) for name in IMAGE_FOLDERS)]
    for place in [Path(given)] if given else places:
        if place.suffix == ".zip" and place.is_file():
            return FileSet(place)
        if place.is_dir() and any(
            os.path.isfile(place / name) for name in (example, f"{example}.png", f"{example}.jpg")
        ):
            return place
    where = given or f"{folder}, nor in {' or '.join(IMAGE_FOLDERS)} in it or beside it"
    raise UserError(
        f"{path}: its images aren't in {where} ({example} is the first); give their folder or zip (--images)"
    )


def _without_small_groups(rows: list[Row]) -> list[Row]:
    """ARO's means over pairs of attributes leave out those of fewer than 25 samples; relations all count."""
    sizes = Counter(row.group for row in rows)
    by_attributes = any(row.group and "_" in row.group for row in rows)
    return [row._replace(group=None) if by_attributes and sizes[row.group] < SMALLEST_GROUP else row for row in rows]


def _present(files: FileSet | Path) -> Callable[[str], bool]:
    if isinstance(files, FileSet):
        return files.present.__contains__
    return lambda name: os.path.isfile(os.path.join(files, name))


def _with_extension(row: Row, present: Callable[[str], bool]) -> Row:
    """Winoground and WinoGAViL name their images without extension, and Winoground's zip has them in a folder."""
    names = [f"{folder}{row.name}{end}" for folder in ("", "images/") for end in ("", ".png", ".jpg")]
    return row._replace(name=next(filter(present, names), row.name))
