"""What is unwise about a recipe and its data, though it can be obeyed."""

from __future__ import annotations

from dsclip.config import Recipe


def data_warnings(recipe: Recipe, set_samples: list[int], damaged: dict[str, str] | None = None) -> list[str]:
    """Sentences for the start of a run. set_samples: of each set that is mixed; damaged {shard: what is lost}."""
    if recipe.data.order == "stream":
        return [
            "data.order=stream: shards are read from end to end; a resumed run reads unfinished ones again from their beginning"
        ]
    batch, weights = recipe.batch.global_batch_size, recipe.data.weights or [1.0]
    warnings = [f"warning: {shard} is damaged, {lost}" for shard, lost in (damaged or {}).items()]
    for samples, weight in zip(set_samples, weights, strict=True):
        drawn = batch * weight / sum(weights)
        if drawn <= samples:
            continue
        found = f"a global batch of {batch} takes {drawn:.0f} samples of a set of {samples}"
        if recipe.loss.duplicates == "negative":
            warnings.append(
                f"warning: {found}, so images meet themselves as negatives. Use batch.global_batch_size={samples} or less, or "
                "loss.duplicates=mask and data.group_key=image_id"
            )
        elif recipe.data.group_key is None:
            warnings.append(
                f"warning: {found}, and an image with several captions meets itself as a negative, because duplicates are "
                "told by equal captions. Name a key of the images in data.group_key, such as image_id"
            )
    return warnings
