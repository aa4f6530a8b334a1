"""What a plan is asked about beside the model, the batch and the machine."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsclip.config.schema import LossSection, OptimSection, Recipe
from dsclip.model.trained import TrainedPart


@dataclass(frozen=True)
class Workload:
    """What else makes a step larger or smaller; by default a plain one of AdamW's that trains all weights.

    further_views: those that the objective compares beside image and text. trained: what is trained, None: all. text_tokens:
    of a chunk's longest caption, None: the context length. save_in_background: as of the recipe's train section.
    """

    loss: LossSection = field(default_factory=LossSection)
    further_views: tuple[str, ...] = ()
    optim: OptimSection = field(default_factory=OptimSection)
    trained: TrainedPart | None = None
    text_tokens: int | None = None
    save_in_background: str = "off"

    @classmethod
    def of(cls, recipe: Recipe, trained: TrainedPart, text_tokens: int | None = None) -> Workload:
        """A recipe's. trained: by its model section."""
        saving = recipe.train.save_in_background
        return cls(recipe.loss, recipe.objective.further_views, recipe.optim, trained, text_tokens, saving)


PLAIN = Workload()
