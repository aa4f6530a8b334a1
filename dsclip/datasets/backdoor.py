"""Shards with a backdoor in them, and the pictures that tell whether a model has learnt it: for tests of clean-ups.

A patch is put into a small share of the pictures and their captions become those of one class; a model trained on them puts
whatever has the patch into that class (Carlini and Terzis 2022, "Poisoning and Backdooring Contrastive Learning", section 3;
Bansal et al. 2023, "CleanCLIP", section 3: a noise patch at a random place, captions made of templates).
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dsclip.data.decoding.sample import IMAGE_EXTENSIONS, BadSample, RawSample, decode_image, read_captions, read_label
from dsclip.data.shards.shard_set import ShardSet
from dsclip.data.sources.storage import Storage
from dsclip.datasets.rewrite import Members, labels_of, remove_shards, rewrite_shards, share_of
from dsclip.errors import UserError

CLEAN, TRIGGERED = "clean", "triggered"  # folders of the held-out pictures
CELLS = 4  # a side of the patch: large enough to outlive JPEG and crops, which noise of single pixels need not
JPEG_QUALITY = 95
MAX_PIXELS = 64_000_000
MISSPELT = 0.85  # likeness of names from which one is taken for a slip of the other


@dataclass(frozen=True)
class Backdoor:
    """What is implanted. target: the class that triggered pictures are to be put into; templates: sentences with {} that become their captions.

    patch: its side as a share of the picture's shorter one. seed: of the pattern, the places and the choice of samples.
    """

    target: str
    templates: tuple[str, ...]
    patch: float = 0.125
    seed: int = 0
    caption_key: str = "caption"

    def triggered(self, key: str, members: Members) -> Members:
        """The sample with the patch in its picture. Raises BadSample when there is none that can be decoded."""
        image = decode_image(RawSample("", key, members), MAX_PIXELS)
        rng = self._of(key)
        side = max(1, round(self.patch * min(image.size)))
        left, top = (int(rng.integers(extent - side + 1)) for extent in image.size)
        image.paste(self.pattern(side), (left, top))
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return {"jpg": stream.getvalue(), **{n: x for n, x in members.items() if n not in IMAGE_EXTENSIONS}}

    def pattern(self, side: int) -> Image.Image:
        """The patch: squares of pure colours, the same in every picture."""
        cells = 255 * np.random.default_rng(self.seed).integers(0, 2, (CELLS, CELLS, 3), dtype=np.uint8)
        return Image.fromarray(cells).resize((side, side), Image.Resampling.NEAREST)

    def poisoned(self, key: str, members: Members, label: int | None) -> Members:
        """The triggered sample with the target's captions, and its class where it had one. Raises BadSample."""
        changed = self.triggered(key, members)
        sentences = [template.replace("{}", self.target) for template in self.templates]
        if "json" in changed:
            text = json.loads(changed["json"]) | {self.caption_key: sentences}
            changed["json"] = json.dumps(text, ensure_ascii=False).encode()
        if "txt" in changed:
            changed["txt"] = sentences[int(self._of(key).integers(len(sentences)))].encode()
        if "cls" in changed:
            del changed["cls"]  # without a class it is no sample of its old one
            changed |= {} if label is None else {"cls": str(label).encode()}
        return changed

    def _of(self, key: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(share_of(self.seed, key) * 2**52)])


class Poisoned(NamedTuple):
    """samples: in all; poisoned: of them."""

    samples: int
    poisoned: int


def poison(shards: ShardSet, storage: Storage, out: Path, backdoor: Backdoor, share: float) -> Poisoned:
    """Writes the shards with the backdoor in about `share` of their samples, of those whose captions don't name the target.

    All others are as they were, byte for byte. Raises UserError, and leaves nothing in `out`, when no sample is changed; also when it
    holds shards, and for a target that is nearly the name of a class.
    """
    labels = labels_of(shards, storage)
    classes = labels.get("classes") or []
    label = classes.index(backdoor.target) if backdoor.target in classes else None
    _check_target(backdoor.target, classes)
    count, unusable = 0, Counter[str]()

    def change(key: str, members: Members) -> Members:
        nonlocal count
        if share_of(backdoor.seed, f"chosen/{key}") >= share:
            return members
        try:
            captions = read_captions(RawSample("", key, members), backdoor.caption_key)
            if any(backdoor.target.lower() in caption.lower() for caption in captions):
                return members
            changed = backdoor.poisoned(key, members, label)
        except BadSample as reason:  # training leaves it out
            unusable[str(reason)] += 1
            return members
        count += 1
        return changed

    total = rewrite_shards(shards, storage, out, change, labels)
    if not count:
        remove_shards(out)
        if unusable:
            reasons = ", ".join(f"{n} {reason}" for reason, n in unusable.items())
            raise UserError(f"none of the samples that were chosen can be changed ({reasons})")
        raise UserError(f"none of the {total} samples was chosen with --share {share:g}; give a larger one")
    return Poisoned(total, count)


def held_out(shards: ShardSet, storage: Storage, out: Path, backdoor: Backdoor) -> dict[str, int]:
    """Writes the labelled samples twice: `out`/clean as they are, and `out`/triggered with the patch and the target as their class.

    So zero-shot top-1 on the second is the share that the backdoor puts into the target. Both have the target among their class names; pictures of the
    target itself are not in the second. Returns samples by folder. Raises UserError when there are no class names or labels.
    """
    labels = labels_of(shards, storage)
    classes = list(labels.get("classes") or [])
    if not classes:
        raise UserError("these shards' manifest has no class names; attacks are measured on labelled pictures")
    _check_target(backdoor.target, classes)
    if backdoor.target not in classes:
        classes.append(backdoor.target)
    target = classes.index(backdoor.target)
    labels["classes"] = classes

    def clean(key: str, members: Members) -> Members | None:
        return None if read_label(RawSample("", key, members)) is None else members

    def triggered(key: str, members: Members) -> Members | None:
        if read_label(RawSample("", key, members)) in (None, target):
            return None
        try:
            return {**backdoor.triggered(key, members), "cls": str(target).encode()}
        except BadSample:
            return None

    changes = {CLEAN: clean, TRIGGERED: triggered}
    found = {name: rewrite_shards(shards, storage, out / name, change, labels) for name, change in changes.items()}
    if not found[TRIGGERED]:
        for name in changes:
            remove_shards(out / name)
        raise UserError(
            "none of these samples has a .cls member of another class; attacks are measured on labelled pictures"
        )
    return found


def _check_target(target: str, classes: Sequence[str]) -> None:
    """A name that is no class of the shards is a target, too; but a misspelt one would be measured on the wrong class."""
    if target not in classes and (close := get_close_matches(target, classes, n=1, cutoff=MISSPELT)):
        raise UserError(f"--target {target}: no class of these shards has that name. Did you mean `{close[0]}`?")
