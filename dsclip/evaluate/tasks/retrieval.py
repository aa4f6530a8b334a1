"""Image-text retrieval: recall@k both ways, with several captions an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsclip.data import EvalDataset
from dsclip.errors import UserError
from dsclip.evaluate.features import check_finite
from dsclip.evaluate.results.result import Measured, Outcomes
from dsclip.evaluate.tasks.task import Embedded, Images, Options, TaskKind

RECALL_AT = (1, 5, 10)
ROWS_AT_ONCE = 1024  # of the similarity matrix


class Retrieval:
    """Recall@k both ways.

    Image to text: one of the image's own captions is among the k best of all captions, averaged over images. Text to
    image: the caption's image is among the k best, averaged over captions (as in CLIP_benchmark). Images without captions
    don't take part, also not as candidates. A k that exceeds the candidates would be 1 for every model, and is left out.
    """

    def __init__(self, dataset: EvalDataset, options: Options):
        self._indices = retrieval_samples(dataset)
        self._owner = torch.tensor([i for i in self._indices for _ in dataset.captions[i]])
        self.images = (Images(dataset, self._indices),)
        self.protocol = {"equal_similarities": "lower index first"}
        self.texts = [caption for i in self._indices for caption in dataset.captions[i]]

    def measure(self, images: Sequence[Embedded], text: Tensor) -> Measured:
        """{"image_to_text_recall@k", "text_to_image_recall@k" for k = 1, 5, 10, "images", "captions"}."""
        image, decoded = images[0]
        rows = torch.full((self._indices[-1] + 1,), -1)
        rows[decoded] = torch.arange(len(decoded))
        owner = rows[self._owner]
        return measure_retrieval(image, text[owner >= 0], owner[owner >= 0]).of_samples(decoded)


RETRIEVAL = TaskKind("retrieval", Retrieval)


def retrieval_samples(dataset: EvalDataset) -> list[int]:
    """The samples that have captions; the others don't take part. Raises UserError when none has."""
    indices = [i for i, captions in enumerate(dataset.captions) if captions]
    if not indices:
        raise UserError("retrieval needs captions; these shards have none")
    return indices


def measure_retrieval(image: Tensor, text: Tensor, owner: Tensor) -> Measured:
    """The result of features: image [n, d], text [m, d], owner [m]: the image each caption belongs to.

    Raises UserError for features that are not finite, images without captions, and captions without an image.
    """
    check_finite("image features", image)
    check_finite("text features", text)
    captions = _captions_of_images(owner, len(image), len(text))
    if not captions.all():
        bare = (captions == 0).nonzero().flatten().tolist()
        raise UserError(
            f"{len(bare)} of {len(image)} images have no caption (the first is number {bare[0]}): leave them out of the "
            "features, as the task does; no caption can be the right one for them"
        )
    text_ranks = _rank_of_positive(text, image, owner)
    image_ranks = _best_rank_of_positives(image, text, owner)
    rows = torch.arange(len(image))
    recalls = {f"image_to_text_recall@{k}": _hits(image_ranks < k, rows) for k in RECALL_AT if k <= len(text)}
    recalls |= {f"text_to_image_recall@{k}": _hits(text_ranks < k, owner) for k in RECALL_AT if k <= len(image)}
    return Measured(recalls, {"images": len(image), "captions": len(text)})


def _captions_of_images(owner: Tensor, images: int, captions: int) -> Tensor:
    """[images]: how many captions each has."""
    if owner.shape != (captions,) or (captions and not 0 <= int(owner.min()) <= int(owner.max()) < images):
        raise UserError(f"owner must name one of the {images} images for each of the {captions} captions")
    return owner.bincount(minlength=images)


def _hits(hits: Tensor, units: Tensor) -> Outcomes:
    return Outcomes(hits.float(), units)


def _rank_of_positive(queries: Tensor, candidates: Tensor, owner: Tensor) -> Tensor:
    """Rank from 0 of each query's positive, the candidate `owner` says; among equal scores the one with the lower index comes first."""
    ranks = []
    for start in range(0, len(queries), ROWS_AT_ONCE):
        scores = queries[start : start + ROWS_AT_ONCE] @ candidates.T
        positive = owner[start : start + ROWS_AT_ONCE, None]
        ranks.append(_ranks(scores, positive).squeeze(1))
    return torch.cat(ranks)


def _best_rank_of_positives(image: Tensor, text: Tensor, owner: Tensor) -> Tensor:
    """Rank from 0 of the best placed of each image's captions."""
    best = torch.full((len(image),), len(text))
    for start in range(0, len(image), ROWS_AT_ONCE):
        scores = image[start : start + ROWS_AT_ONCE] @ text.T
        captions = ((owner >= start) & (owner < start + ROWS_AT_ONCE)).nonzero().squeeze(1)
        rows = owner[captions] - start
        # Only an image's best positive matters, and it is the one with the highest score, first among equals.
        positives = torch.full_like(scores, -torch.inf)
        positives[rows, captions] = scores[rows, captions]
        column = positives.argmax(dim=1, keepdim=True)
        best[start : start + ROWS_AT_ONCE] = _ranks(scores, column).squeeze(1)
    return best


def _ranks(scores: Tensor, column: Tensor) -> Tensor:
    target = scores.gather(1, column)
    before = torch.arange(scores.shape[1]) < column
    return ((scores > target) | ((scores == target) & before)).sum(dim=1, keepdim=True)
