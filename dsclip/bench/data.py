"""Samples a second of an input pipeline on one core: read, decode, augment, tokenize, collate. `python -m dsclip.bench.data JSON`."""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from dsclip.config.data_section import DataSection
from dsclip.data import build_loader, load_tokenizer, resolve_shards
from dsclip.data.decoding.sample import IMAGE_EXTENSIONS
from dsclip.data.decoding.transforms import random_crop
from dsclip.model.config import CLIP_MEAN, CLIP_STD

BATCH = 64
CONTEXT = 77


def ours(shards: str, image_size: int, tokenizer: str, workers: int) -> Iterator[object]:
    """dsclip's loader."""
    return iter(
        build_loader(
            DataSection(train_shards=shards, workers=workers), tokenizer=load_tokenizer(tokenizer), image_size=image_size,
            context_length=CONTEXT, global_batch_size=BATCH, seed=0,
        )
    )  # fmt: skip


def plain(shards: str, image_size: int, tokenizer: str, workers: int) -> Iterator[object]:
    """What a user would write: webdataset, PIL's crop and bicubic resize, float32, normalised."""
    tokenize, rng = load_tokenizer(tokenizer), np.random.default_rng(0)

    def picture(image: Image.Image) -> torch.Tensor:
        box = random_crop(image.width, image.height, [0.9, 1.0], rng)
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]

    return _webdataset(shards, picture, lambda caption: tokenize([caption], CONTEXT)[0], workers)


def open_clip(shards: str, image_size: int, tokenizer: str, workers: int) -> Iterator[object]:
    """OpenCLIP's own training transform and tokenizer, on the same reader: its grouping breaks on webdataset 1.0."""
    import open_clip as package

    transform = package.image_transform(image_size, is_train=True)
    tokenize = package.get_tokenizer("ViT-B-32")
    return _webdataset(shards, transform, lambda caption: tokenize(caption)[0], workers)


def _webdataset(
    shards: str, picture: Callable[[Image.Image], torch.Tensor], tokens: Callable[[str], torch.Tensor], workers: int
) -> Iterator[object]:
    import webdataset

    def prepare(sample: dict[str, bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        extension = next(e for e in IMAGE_EXTENSIONS if e in sample)
        image = Image.open(io.BytesIO(sample[extension])).convert("RGB")
        if "json" in sample:
            captions = json.loads(sample["json"])["caption"]
            caption = captions[0] if isinstance(captions, list) else captions
        else:
            caption = sample["txt"].decode()
        return picture(image), tokens(caption)

    data = webdataset.WebDataset(resolve_shards(shards), shardshuffle=100, empty_check=False).shuffle(512).map(prepare)
    loader = torch.utils.data.DataLoader(data.repeat(), batch_size=BATCH, num_workers=workers)
    return iter(loader)


VARIANTS = {"dsclip": ours, "plain": plain, "open_clip": open_clip}


def measure(variant: str, shards: str, image_size: int, tokenizer: str, workers: int, samples: int) -> dict[str, float]:
    """{"samples_per_second", "samples_per_second_per_core"}: the best of three stretches, after one to warm up."""
    torch.set_num_threads(1)
    batches = VARIANTS[variant](shards, image_size, tokenizer, workers)
    count = max(1, samples // BATCH)
    best = 0.0
    for stretch in range(4):
        started = time.perf_counter()
        for _ in itertools.islice(batches, count):
            pass
        if stretch:
            best = max(best, count * BATCH / (time.perf_counter() - started))
    return {"samples_per_second": best, "samples_per_second_per_core": best / max(1, workers)}


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
