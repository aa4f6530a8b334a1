"""Does an image prefer its own captions to hard negatives that were written for it? (As in ARO, Yuksekgonul et al. 2023.)"""

from __future__ import annotations

from torch import Tensor

from dsclip.errors import UserError
from dsclip.evaluate.features import Encoder, encode_images, encode_texts
from dsclip.losses import Group


def hard_negatives(
    encode_image: Encoder,
    encode_text: Encoder,
    dataset,
    tokenizer,
    group: Group,
    *,
    context_length: int,
    batch_size: int,
) -> dict[str, float]:
    """{"accuracy", "images", "pairs"}: the share of pairs (own caption, hard negative of the same image) in which the
    own caption is the more similar one; 0.5 by chance. Images without hard negatives don't count. Collective.
    """
    images, indices = encode_images(encode_image, dataset, hard_negative_samples(dataset), batch_size, group)
    texts = [t for i in indices for t in (*dataset.captions[i], *dataset.negatives[i])]
    features = encode_texts(encode_text, texts, tokenizer, context_length, batch_size, group)
    right = pairs = start = 0
    for row, i in enumerate(indices):
        middle = start + len(dataset.captions[i])
        stop = middle + len(dataset.negatives[i])
        wins = _wins(images[row], features[start:middle], features[middle:stop])
        right, pairs, start = right + int(wins.sum()), pairs + wins.numel(), stop
    return {"accuracy": right / pairs, "images": len(indices), "pairs": pairs}


def hard_negative_samples(dataset) -> list[int]:
    """The samples that have captions and hard negatives. Raises UserError when none has."""
    indices = [
        i for i, (own, wrong) in enumerate(zip(dataset.captions, dataset.negatives, strict=True)) if own and wrong
    ]
    if not indices:
        raise UserError(
            "this task needs hard negatives; give samples a .neg.txt member or a list under `negatives` in their .json"
        )
    return indices


def _wins(image: Tensor, own: Tensor, wrong: Tensor) -> Tensor:
    """[captions, negatives] bool for an image [d]."""
    return (own @ image)[:, None] > (wrong @ image)[None, :]
