"""Named heads: ends of a tower beside its projection, for terms of the objective. No export has them.

Shapes: B samples of a chunk, W width of what a tower pools, D embedding width, K numbers that a head gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsclip.config.objective_section import HeadSection, ObjectiveSection
from dsclip.errors import UserError
from dsclip.model.blocks import Linear
from dsclip.model.clip import Clip
from dsclip.model.towers import unit_rows

NAMED = ".head.named."  # between a tower and a head in the names of weights: visual.head.named.projector.output.weight


class Projector(nn.Module):
    """x [B, W] -> unit features [B, K] in float32: Linear, GELU, Linear.

    The non-linear projection head of SimCLR (Chen et al. 2020, §4.2), without its batch norms, which would see a chunk each.
    """

    def __init__(self, width: int, hidden: int, features: int):
        super().__init__()
        self.hidden = Linear(width, hidden, std=width**-0.5, zero_bias=True)
        self.output = Linear(hidden, features, std=hidden**-0.5, zero_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return unit_rows(self.output(F.gelu(self.hidden(x))))


class Prototypes(nn.Module):
    """x [B, W] -> its cosines [B, K] with K learned vectors, in float32 (Caron et al. 2020, SwAV, §3.1).

    The vectors are normalised where they are used, so that they stay sharded; SwAV's code writes them back after each step.
    """

    def __init__(self, width: int, prototypes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(prototypes, width).normal_(std=width**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return unit_rows(x) @ unit_rows(self.weight).T


class Classifier(nn.Module):
    """x [B, W] -> a logit for each class [B, K], in float32 or wider."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.output = Linear(width, classes, std=width**-0.5, zero_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.output(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class NamedHeads(nn.ModuleDict):
    """Pooled tokens [B, W] -> what each head gives, side by side in their order [B, ΣK]."""

    def __init__(self, heads: Sequence[HeadSection], width: int):
        """width: of what the tower pools. Raises UserError for a name that torch's modules have taken."""
        super().__init__()
        self._of = {head.name: head.of for head in heads}
        projectors = {head.name: head.width for head in heads if head.kind == "projector"}
        for head in heads:
            if hasattr(nn.ModuleDict, head.name):
                raise UserError(
                    f"`objective.heads`: torch's modules have a `{head.name}` of their own; rename the head"
                )
            self[head.name] = _made(head, projectors.get(head.of, width), width)

    def forward(self, pooled: Tensor) -> Tensor:
        found: dict[str, Tensor] = {}
        for name in sorted(self, key=lambda name: self._of[name] in self):  # projectors first
            found[name] = self[name](found.get(self._of[name], pooled))
        return torch.cat([found[name] for name in self], dim=1)


def _made(head: HeadSection, width: int, of_tower: int) -> nn.Module:
    if head.kind == "projector":
        return Projector(width, head.hidden or of_tower, head.width)
    return (Prototypes if head.kind == "prototypes" else Classifier)(width, head.width)


def add_heads(model: Clip, objective: ObjectiveSection) -> None:
    """Puts the objective's heads on the towers. They are trained also where the tower is locked. Raises UserError as `NamedHeads`."""
    for name, tower, width in (
        ("image", model.visual, model.config.vision_width),
        ("text", model.text, model.config.text_width),
    ):
        if heads := objective.heads_of(name):
            tower.head.named = NamedHeads(heads, width)
            tower.locked = min(tower.locked, len(tower.layers()) - 1)


class WithoutHeads(Mapping[str, Tensor]):
    """The weights of the towers alone. heads: the names of those that are left out."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self._weights = weights
        self._names = [name for name in weights if NAMED not in name]
        self.heads = tuple(dict.fromkeys(name.partition(NAMED)[2].split(".")[0] for name in weights if NAMED in name))

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
