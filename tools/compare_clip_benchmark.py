r"""Shows that the same features give the same numbers here and in CLIP_benchmark, task by task.

    python -m pip install --no-deps --target PEER clip-benchmark==1.6.2 scikit-learn scipy joblib threadpoolctl narwhals \
        cloudpickle "numpy<2.4"
    PYTHONPATH=PEER python tools/compare_clip_benchmark.py

Features are drawn at random, so that no two similarities are equal: ties are where definitions differ (docs/evaluation.md). Both get them
through stand-ins for models and data sets whose images and texts are their own features. CLIP_benchmark's linear probe asks for a GPU: its
functions are called one by one instead, in the order of its `evaluate`, with `.cuda()` doing nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dsclip.command_line import parser, run_tool
from dsclip.errors import UserError
from dsclip.evaluate import Embedder, Options, run_task
from dsclip.losses import SingleRank

Both = tuple[dict[str, float], dict[str, float]]  # {metric: value}, ours and theirs
D = 32
CLASSES, TEMPLATES = [f"class {i}" for i in range(10)], ["a {}", "the {}"]


class Drawn:
    """A set for both: unit features of images, captions, hard negatives, labels. Texts are names of features."""

    def __init__(
        self, seed: int, n: int, captions: int = 1, negatives: int = 0, pairs: bool = False, pull: float = 0.5
    ):
        self.g, self.texts, self.pairs = torch.Generator().manual_seed(seed), dict[str, Tensor](), pairs
        self.labels: list[int] = torch.randint(0, len(CLASSES), (n,), generator=self.g).tolist()
        self.images = self.unit(n) + pull * torch.eye(len(CLASSES), D)[self.labels]
        self.captions = [[self.text(i) for _ in range(captions)] for i in range(n)]
        self.negatives = [[self.text(i, 0.1) for _ in range(negatives)] for i in range(n)]
        if pairs:
            self.negatives = [self.captions[i + 1 - 2 * (i % 2)] for i in range(n)]
        for i, name in enumerate(CLASSES):
            centre = torch.eye(len(CLASSES), D)[i]
            self.texts |= {t.replace("{}", name): centre + 0.3 * self.unit(1)[0] for t in TEMPLATES}
        self.groups, self.broken = [None] * n, dict[int, str]()
        self.label_sets: list[tuple[int, ...] | None] = [None] * n
        self.classes, self.templates = CLASSES, TEMPLATES

    def unit(self, n: int) -> Tensor:
        return F.normalize(torch.randn(n, D, generator=self.g), dim=1)

    def text(self, image: int, near: float = 0.4) -> str:
        name = f"text {len(self.texts)}"
        self.texts[name] = near * self.images[image] + self.unit(1)[0]
        return name

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        return self.images[index]

    def same_images(self, *, in_any_box: bool = False) -> list[int]:
        return list(range(len(self)))

    def tokens(self, texts: list[str], _length: int = 0) -> Tensor:
        return torch.stack([self.texts[text] for text in texts])

    def measured(self, task: str, options: Options, batch_size: int = 7) -> dict[str, float]:
        """Ours."""
        encode: Callable[[Tensor], Tensor] = lambda x: F.normalize(x, dim=1)  # noqa: E731
        embedder = Embedder(encode, encode, self.tokens, SingleRank(), 0, batch_size)
        return run_task(task, embedder, self, options).metrics  # type: ignore[arg-type]

    @property
    def model(self) -> Any:
        """What CLIP_benchmark embeds with."""
        return SimpleNamespace(encode_image=lambda x: x.flatten(1), encode_text=lambda x: x)


def zeroshot(peer: Any) -> Both:
    data = Drawn(0, 500)
    loader = DataLoader(TensorDataset(data.images, torch.tensor(data.labels)), 64)
    loader.dataset.classes = CLASSES  # type: ignore[attr-defined]
    templates = [t.replace("{}", "{c}") for t in TEMPLATES]
    theirs = peer("zeroshot_classification").evaluate(
        data.model, loader, data.tokens, CLASSES, templates, "cpu", amp=False
    )
    ours = data.measured("zeroshot", Options())
    names = {"top1": "acc1", "top5": "acc5", "mean_per_class_recall": "mean_per_class_recall"}
    return {name: ours[name] for name in names}, {name: theirs[key] for name, key in names.items()}


def multilabel(peer: Any) -> Both:
    data = Drawn(8, 300)
    targets = torch.rand(300, len(CLASSES), generator=data.g) < 0.2
    data.label_sets = [tuple(row.nonzero().flatten().tolist()) for row in targets]
    loader = DataLoader(TensorDataset(data.images, targets.long()), 64)
    templates = [t.replace("{}", "{c}") for t in TEMPLATES]
    theirs = peer("zeroshot_classification").evaluate(
        data.model, loader, data.tokens, CLASSES, templates, "cpu", amp=False
    )
    name = "mean_average_precision"
    return {name: data.measured("multilabel", Options())[name]}, {name: theirs[name]}


def retrieval(peer: Any) -> Both:
    data, ks = Drawn(1, 300, captions=5), (1, 5, 10)
    batches = [(data.images[i : i + 50], data.captions[i : i + 50]) for i in range(0, 300, 50)]
    found = peer("zeroshot_retrieval").evaluate(
        data.model, batches, data.tokens, "cpu", amp=False, recall_k_list=list(ks)
    )
    theirs = {f"image_to_text_recall@{k}": found[f"text_retrieval_recall@{k}"] for k in ks}
    theirs |= {f"text_to_image_recall@{k}": found[f"image_retrieval_recall@{k}"] for k in ks}
    ours = data.measured("retrieval", Options())
    return {name: ours[name] for name in theirs}, theirs


def sugarcrepe(peer: Any) -> Both:
    data = Drawn(2, 400, negatives=1)
    texts = [[own[0], wrong[0]] for own, wrong in zip(data.captions, data.negatives, strict=True)]
    batches = [(data.images[i : i + 50].view(-1, D, 1, 1), texts[i : i + 50]) for i in range(0, 400, 50)]
    theirs = peer("image_caption_selection").evaluate(data.model, batches, data.tokens, "cpu", amp=False)
    return {"accuracy": data.measured("hard_negatives", Options())["accuracy"]}, {"accuracy": theirs["text_acc"]}


def winoground(peer: Any) -> Both:
    data = Drawn(3, 400, pairs=True)
    texts = [[data.captions[i][0], data.captions[i + 1][0]] for i in range(0, 400, 2)]
    batches = [(data.images[2 * i : 2 * i + 40].view(-1, 2, D, 1, 1), texts[i : i + 20]) for i in range(0, 200, 20)]
    theirs = peer("image_caption_selection").evaluate(data.model, batches, data.tokens, "cpu", amp=False)
    ours = data.measured("winoground", Options())
    names = {"text": "text_acc", "image": "image_acc", "group": "acc"}
    return {name: ours[name] for name in names}, {name: theirs[key] for name, key in names.items()}


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    """`.cuda()` does nothing."""
    same: Callable[..., Any] = lambda x, *_: x  # noqa: E731
    with mock.patch.object(torch.nn.Module, "cuda", same), mock.patch.object(Tensor, "cuda", same):
        yield


def linear_probe(peer: Any) -> Both:
    """The `adamw` solver: their search, their last fit, on the same order of the samples."""
    sets = [Drawn(seed, n, pull=0.2) for seed, n in ((4, 300), (5, 100), (6, 200))]  # so hard that regularisation helps
    train, validation, test = ((F.normalize(s.images, dim=1), torch.tensor(s.labels)) for s in sets)
    probe = peer("linear_probe")

    def loader(*parts: tuple[Tensor, Tensor]) -> Any:
        samples = probe.FeatureDataset(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        return DataLoader(samples, 64, shuffle=True)

    strengths, settings = np.logspace(-6, 2, num=97).tolist(), (D, len(CLASSES), 0.1, 10, False, "cpu", False, 0)
    first = [i for i, value in enumerate(strengths) if value in np.logspace(-6, 2, num=7).tolist()]
    with without_cuda():
        peak = probe.find_peak(strengths, first, loader(train), loader(validation), *settings)
        for span in (8, 4, 2, 1):
            places = [max(peak - span, 0), peak, min(peak + span, 96)]
            peak = probe.find_peak(strengths, places, loader(train), loader(validation), *settings)
        model = probe.train(loader(train, validation), D, len(CLASSES), strengths[peak], 0.1, 10, False, "cpu", 0)
        logits, target = probe.infer(model, loader(test), False, "cpu")
    acc1, acc5 = probe.accuracy(logits.float(), target.float(), topk=(1, 5))
    recall = probe.balanced_accuracy_score(target, logits.argmax(axis=1))
    theirs = {"top1": acc1, "top5": acc5, "mean_per_class_recall": recall, "regularisation": strengths[peak]}
    options = Options(train=sets[0], validation=sets[1], solver="adamw")  # type: ignore[arg-type]
    ours = sets[2].measured("linear_probe", options)
    return {name: ours[name] for name in theirs}, theirs


def logistic_regression(_: Any) -> Both:
    """The `lbfgs` solver against scikit-learn's, which comes with CLIP_benchmark: the largest difference of two probabilities."""
    from sklearn.linear_model import LogisticRegression

    from dsclip.evaluate.tasks.logistic import fit_lbfgs

    data = Drawn(7, 400)
    x, y = F.normalize(data.images, dim=1).double(), torch.tensor(data.labels)
    theirs = (
        LogisticRegression(C=1 / (400 * 1e-3), tol=1e-9, max_iter=5000)
        .fit(x.numpy(), y.numpy())
        .predict_proba(x.numpy())
    )
    ours = fit_lbfgs(x, y, len(CLASSES), 1e-3)(x).softmax(dim=1)
    place = (ours - torch.from_numpy(theirs)).abs().argmax()
    return {"probability": ours.flatten()[place].item()}, {"probability": float(theirs.flatten()[place])}


TASKS = (zeroshot, multilabel, retrieval, sugarcrepe, winoground, linear_probe, logistic_regression)


def compare(_: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """({task: {metric: {"ours", "theirs"}}}, a table). Raises UserError where CLIP_benchmark isn't installed."""

    def peer(name: str) -> Any:
        try:
            return importlib.import_module(f"clip_benchmark.metrics.{name}")
        except ImportError as error:
            raise UserError(
                f"CLIP_benchmark can't be imported ({error}); this program's docstring says how to install it"
            ) from error

    found: dict[str, Any] = {}
    for task in TASKS:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # their progress
            ours, theirs = task(peer)
        found[task.__name__] = {name: {"ours": ours[name], "theirs": float(theirs[name])} for name in theirs}
    rows = [f"{'':20} {'':26} {'dsclip':>12} {'theirs':>12} {'difference':>11}"]
    rows += [
        f"{task:20} {name:26} {v['ours']:12.8f} {v['theirs']:12.8f} {abs(v['ours'] - v['theirs']):11.1e}"
        for task, metrics in found.items()
        for name, v in metrics.items()
    ]
    return found, "\n".join(rows)


if __name__ == "__main__":
    p = parser(
        "Compares metrics with CLIP_benchmark's on the same features.",
        "PYTHONPATH=PEER python tools/compare_clip_benchmark.py",
    )
    sys.exit(run_tool(compare, p.parse_args()))
