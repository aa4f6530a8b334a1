"""The peer CLIP_benchmark: zero-shot and retrieval by its functions, with OpenCLIP's model of the same weights.

python -m pip install clip-benchmark open_clip_torch "numpy<2.4"        # and the torchvision of the installed torch
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.source import open_source
from dsclip.convert.whole import whole_model
from dsclip.data import EvalDataset, build_eval_dataset

Batch = tuple[Tensor, Any]  # images [b, 3, S, S], and their labels or captions


CONVERTED = "openclip"  # the model's folder in OpenCLIP's layout


def write_model(folder: Path) -> None:
    """Writes the weights of `folder/model` as OpenCLIP reads them."""
    with TemporaryDirectory() as temporary:
        export_openclip(whole_model(open_source(folder / "model"), Path(temporary) / "tokenizer"), folder / CONVERTED)


def run(folder: Path, batch_size: int) -> list[float]:
    """Seconds of all cores that the images of zero-shot, then of retrieval took, decoding included; what is in folder: see `evaluation_peer`."""
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    place = f"local-dir:{folder / CONVERTED}"
    clip, _, preprocess = open_clip.create_model_and_transforms(place, precision="fp32")
    tokenizer = open_clip.get_tokenizer(place)
    dataset = build_eval_dataset(str(folder / "set"), image_size=clip.visual.image_size[0])
    model = _Timed(clip.eval())
    names, templates = dataset.classes or [], [t.replace("{}", "{c}") for t in dataset.templates or []]
    labels = torch.tensor([-1 if label is None else label for label in dataset.labels])
    of_images = []
    for said in (labels, dataset.captions):
        model.seconds = 0.0
        batches = _Loader(dataset, model, preprocess, said, batch_size)
        if said is labels:
            zeroshot_classification.evaluate(model, batches, tokenizer, names, templates, "cpu", amp=False)
        else:
            zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
        of_images.append(model.seconds)
    return of_images


class _Timed:
    """A model that counts the seconds its images take."""

    def __init__(self, model: Any):
        self._model, self.seconds = model, 0.0
        self.encode_text = model.encode_text

    def encode_image(self, images: Tensor) -> Tensor:
        before = sum(os.times()[:4])
        features: Tensor = self._model.encode_image(images)
        self.seconds += sum(os.times()[:4]) - before
        return features


class _Loader:
    """As much of a DataLoader as CLIP_benchmark asks for; what its batches take counts among the model's seconds."""

    def __init__(self, dataset: EvalDataset, model: _Timed, preprocess: Any, said: Any, size: int):
        self.dataset, self._model, self._preprocess, self._said, self._size = dataset, model, preprocess, said, size

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.dataset), self._size):
            before, stop = sum(os.times()[:4]), min(start + self._size, len(self.dataset))
            images = [self._preprocess(Image.open(io.BytesIO(self.dataset.file(i)))) for i in range(start, stop)]
            self._model.seconds += sum(os.times()[:4]) - before
            yield torch.stack(images), self._said[start:stop]
