"""Evaluation while training, through the sharded engine, on all ranks."""

from __future__ import annotations

import torch

from dsclip.config import Recipe
from dsclip.data import build_eval_dataset
from dsclip.data.sources import Reader
from dsclip.engine import Collectives
from dsclip.evaluate import hard_negatives, retrieval, zeroshot
from dsclip.evaluate.features import encode_images, encode_texts
from dsclip.evaluate.retrieval import retrieval_samples
from dsclip.model import ClipConfig
from dsclip.train.pictures import retrieval_grid, similarity_matrix

PICTURE_SAMPLES = 64


class Evaluation:
    """The tasks of a recipe's `eval` section. Every method is collective: ZeRO-3 gathers weights in each forward."""

    def __init__(self, recipe: Recipe, model: ClipConfig, tokenizer, group: Collectives):
        self._settings, self._model, self._tokenizer, self._group = recipe.eval, model, tokenizer, group
        self._data = recipe.data
        # Opened here, so that missing evaluation shards stop the run before its first step.
        self._zeroshot = self._open(recipe.eval.zeroshot_shards)
        self._retrieval = self._open(recipe.eval.retrieval_shards)
        self._hard_negatives = self._open(recipe.eval.hard_negatives_shards)

    def _open(self, shards):
        if shards is None:
            return None
        return build_eval_dataset(
            shards,
            image_size=self._model.image_size,
            max_samples=self._settings.max_samples,
            caption_key=self._data.caption_key,
            negative_key=self._data.negative_key,
            max_image_pixels=self._data.max_image_pixels,
            reader=Reader(tuple(self._data.trusted_hosts), self._data.retries),
        )

    def due(self, step: int, last: bool) -> bool:
        """Whether this step is followed by an evaluation."""
        every = self._settings.every_steps
        return last or (every is not None and step % every == 0)

    def run(self, engine, watch) -> dict[str, dict[str, float]]:
        """{task: {metric: value}}, also written to TensorBoard with pictures of what the model retrieves."""
        shared = dict(context_length=self._model.context_length, batch_size=self._settings.batch_size)
        encoders = (engine.encode_image, engine.encode_text)
        results = {}
        if self._zeroshot is not None:
            watch.message("evaluating zero-shot classification")
            results["zeroshot"] = zeroshot(
                *encoders, self._zeroshot, self._tokenizer, self._group,
                classnames=self._settings.classnames, templates=self._settings.templates, **shared,
            )  # fmt: skip
        if self._retrieval is not None:
            watch.message("evaluating retrieval")
            results["retrieval"] = retrieval(*encoders, self._retrieval, self._tokenizer, self._group, **shared)
            self._show_pictures(engine, watch)
        if self._hard_negatives is not None:
            watch.message("evaluating hard negatives")
            results["hard_negatives"] = hard_negatives(
                *encoders, self._hard_negatives, self._tokenizer, self._group, **shared
            )
        watch.evaluated(engine.step, results)
        return results

    def _show_pictures(self, engine, watch) -> None:
        """The first pairs of the retrieval set: what each caption finds, and all similarities as a heat map."""
        data, batch_size = self._retrieval, self._settings.batch_size
        # Some labelled images have no caption, and some images can't be decoded: the evaluation has found those by now.
        indices = [i for i in retrieval_samples(data) if i not in data.broken][:PICTURE_SAMPLES]
        image, indices = encode_images(engine.encode_image, data, indices, batch_size, self._group)
        captions = [data.captions[i][0] for i in indices]
        text = encode_texts(
            engine.encode_text, captions, self._tokenizer, self._model.context_length, batch_size, self._group
        )
        if self._group.rank == 0:
            similarity = (text @ image.T).numpy()
            images = torch.stack([data.image(i) for i in indices]).numpy()
            watch.picture("eval/retrieval", retrieval_grid(images, captions, similarity), engine.step)
            watch.picture("eval/similarity", similarity_matrix(similarity), engine.step)
