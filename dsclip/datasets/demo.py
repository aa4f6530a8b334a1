"""The embedded data set `demo`: procedural pictures with compositional captions, written once as real JPEG shards.

Deterministic by seed, byte for byte. The held-out split shows pairs of colour and shape that training never does, so
that a model which only memorised combinations fails it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from dsclip.data.shards.writer import ShardWriter
from dsclip.datasets.scenes import HELD_OUT, captions, draw, random_scene, swapped_captions
from dsclip.datasets.train_tokenizer import train_tokenizer
from dsclip.files import permit_as_new

VERSION = 2  # part of the folder's name: raise it whenever a written byte changes
IMAGE_SIZE = 64
TRAIN_SAMPLES, VAL_SAMPLES, SHARD_SIZE = 8000, 600, 1000
SEED = 0
VOCABULARY = 700
CLASSES = sorted(f"{colour} {shape}" for colour, shape in HELD_OUT)  # what zero-shot classification chooses from
TEMPLATES = ["a {}", "a picture of a {}", "there is a {}"]


def demo_folder(root: Path | None = None) -> Path:
    """The folder with `train/`, `val/` and `tokenizer/`, written on first use.

    root: where data sets are kept; the environment variable DSCLIP_CACHE, or ~/.cache/dsclip.
    """
    root = root or Path(os.environ.get("DSCLIP_CACHE") or Path.home() / ".cache" / "dsclip")
    return demo_once(root / f"demo-v{VERSION}-seed{SEED}")


def demo_once(folder: Path, train_samples: int = TRAIN_SAMPLES, val_samples: int = VAL_SAMPLES) -> Path:
    """The folder, with the demo's data of so many samples, which are the first of more; written if it isn't there.

    Several processes may ask at once: each writes aside, the first to finish is kept.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    permit_as_new(temporary)
    try:
        write_demo(temporary, SEED, train_samples, val_samples)
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def write_demo(folder: Path, seed: int, train_samples: int = TRAIN_SAMPLES, val_samples: int = VAL_SAMPLES) -> None:
    """Writes both splits and a tokenizer trained on the training captions."""
    train = _write_split(folder / "train", seed, train_samples, held_out=False)
    _write_split(folder / "val", seed + 1, val_samples, held_out=True)
    train_tokenizer(train, folder / "tokenizer", VOCABULARY)


def _write_split(folder: Path, seed: int, samples: int, *, held_out: bool) -> list[str]:
    """Returns the captions. Half of the scenes have two objects; held-out scenes with one object carry its class."""
    written = []
    classes, templates = (CLASSES, TEMPLATES) if held_out else (None, None)
    size = min(SHARD_SIZE, max(1, samples // 2))
    with ShardWriter(folder, size, classes=classes, templates=templates) as writer:
        for index in range(samples):
            rng = np.random.default_rng([seed, index])
            scene = random_scene(rng, held_out=held_out, two_objects=index % 2 == 1)
            sentences = captions(scene, rng)
            picture = io.BytesIO()
            draw(scene, IMAGE_SIZE, rng).save(picture, "JPEG", quality=92)
            negatives = swapped_captions(scene, np.random.default_rng([seed, index, 1]))
            text = {"caption": sentences, "negatives": negatives}
            members = {"jpg": picture.getvalue(), "json": json.dumps(text).encode()}
            if held_out and len(scene.objects) == 1:
                members["cls"] = str(CLASSES.index(scene.objects[0].name)).encode()
            writer.write(f"{index:06d}", members)
            written += sentences
    return written
