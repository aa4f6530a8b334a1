"""Evaluation while training, through the sharded engine, on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dsclip.config import Recipe
from dsclip.data import EvalDataset, build_eval_dataset
from dsclip.data.decoding.tokenizer import Tokenizer
from dsclip.data.shards.overlap import data_name, training_pairs
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError
from dsclip.evaluate import IN_TRAINING, Embedder, Options, prepare_task, run_task, with_intervals
from dsclip.evaluate.tasks.retrieval import retrieval_samples
from dsclip.model import ClipConfig
from dsclip.train.pictures import retrieval_grid, similarity_matrix
from dsclip.train.records import Results
from dsclip.train.watch import Watch

if TYPE_CHECKING:  # importing it takes DeepSpeed's seconds
    from dsclip.engine.contrastive import ContrastiveEngine

PICTURE_SAMPLES = 64


class Evaluation:
    """The tasks of a recipe's `eval` section.

    Building it opens the sets and checks that each has what its task needs, so that a mistake ends a run before its first
    step: raises UserError, which names the key. names: {task: its data, and whether they are training pairs}.
    """

    def __init__(self, recipe: Recipe, model: ClipConfig, tokenizer: Tokenizer):
        self._settings, self._data, self._model, self._tokenizer = recipe.eval, recipe.data, model, tokenizer
        self._storage = Storage(tuple(recipe.data.trusted_hosts), recipe.data.retries)
        self._options = Options(recipe.eval.classnames, recipe.eval.templates, brief=True)
        self.sets: dict[str, EvalDataset] = {}
        self.names: dict[str, str] = {}
        for task in IN_TRAINING:
            shards = getattr(recipe.eval, f"{task}_shards")
            if shards is None:
                continue
            try:
                self.sets[task] = self._open(shards)
                prepare_task(task, self.sets[task], self._options)
            except UserError as error:
                raise UserError(f"eval.{task}_shards={data_name(shards, None)}: {error}") from error
            held = self.sets[task].shards
            pairs = training_pairs(held, recipe.data.train_shards, self._storage) if held else None
            self.names[task] = data_name(shards, pairs)

    def _open(self, shards: str | list[str]) -> EvalDataset:
        return build_eval_dataset(
            shards,
            image_size=self._model.image_size,
            max_samples=self._settings.max_samples,
            caption_key=self._data.caption_key,
            negative_key=self._data.negative_key,
            max_image_pixels=self._data.max_image_pixels,
            storage=self._storage,
        )

    def due(self, step: int, last: bool) -> bool:
        """Whether this step is followed by an evaluation."""
        every = self._settings.every_steps
        return last or (every is not None and step % every == 0)

    def run(self, engine: ContrastiveEngine, watch: Watch) -> Results:
        """{task: {metric: value, metric_ci95: [lower, upper]}}, also written to TensorBoard with pictures of what the model retrieves.

        Collective: ZeRO-3 gathers weights in each forward.
        """
        settings = self._settings
        embedder = Embedder(
            engine.encode_image, engine.encode_text, self._tokenizer, engine.group, self._model.context_length,
            settings.batch_size, embedded=lambda what, more: watch.heart.beat(),
        )  # fmt: skip
        results: Results = {}
        for task, dataset in self.sets.items():
            watch.message(f"evaluating {task.replace('_', ' ')} on {self.names[task]}")
            results[task] = with_intervals(run_task(task, embedder, dataset, self._options))
            if task == "retrieval":
                self._show_pictures(embedder, engine.step, watch)
            if dataset.bad:
                results[task]["left_out"] = dataset.bad.total()
                reasons = ", ".join(f"{count} {reason}" for reason, count in dataset.bad.items())
                watch.message(f"left out of {self.names[task]}: {reasons}")
        watch.evaluated(engine.step, results, self.names)
        return results

    def _show_pictures(self, embedder: Embedder, step: int, watch: Watch) -> None:
        """The first pairs of the retrieval set: what each caption finds, and all similarities as a heat map."""
        data = self.sets["retrieval"]
        # Some labelled images have no caption, and some images can't be decoded: the evaluation has found those by now.
        indices = [i for i in retrieval_samples(data) if i not in data.broken][:PICTURE_SAMPLES]
        image, indices = embedder.images(data, indices)
        captions = [data.captions[i][0] for i in indices]
        text = embedder.texts(captions)
        if embedder.group.rank == 0:
            similarity = (text @ image.T).numpy()
            images = torch.stack([data.image(i) for i in indices]).numpy()
            name = self.names["retrieval"]
            watch.picture("eval/retrieval", retrieval_grid(images, captions, similarity, name), step)
            watch.picture("eval/similarity", similarity_matrix(similarity, name), step)
