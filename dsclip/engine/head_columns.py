"""Where the features of named heads lie in what a tower gives: behind those of its projection, in the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsclip.config.objective_section import ObjectiveSection, tower_of

TEXTS = ("text", "hard_text")


@dataclass(frozen=True)
class HeadColumns:
    """widths: of each head, by tower, in their order; projection: columns before them. exact: heads whose numbers no rank
    sends to others, so that they keep their precision."""

    projection: int = 0
    widths: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    exact: frozenset[str] = frozenset()

    @classmethod
    def of(cls, objective: ObjectiveSection, projection: int) -> HeadColumns:
        """projection: the embedding width."""
        towers = {tower: {h.name: h.width for h in objective.heads_of(tower)} for tower in ("image", "text")}
        exact = frozenset(head.name for head in objective.heads if head.kind != "projector")
        return cls(projection, {tower: heads for tower, heads in towers.items() if heads}, exact)

    def split(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the towers gave, by view, as features: `image_2` [n, D + ΣK] as `image_2` [n, D], `image_2.projector` [n, K], …"""
        features: dict[str, Tensor] = {}
        for view, rows in found.items():
            heads = self._heads(view)
            if not heads:
                features[view] = rows
                continue
            own, *others = rows.split([self.projection, *heads.values()], dim=1)
            features[view] = own
            if view != "hard_text":  # no term is given features of hard negatives
                features |= {f"{view}.{name}": x for name, x in zip(heads, others, strict=True)}
        return features

    def joined(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: gradients of features as those of what the towers gave, zero where there is none."""

        def whole(view: str, own: Tensor) -> Tensor:
            heads = self._heads(view)
            if not heads:
                return own
            others = [gradients.get(f"{view}.{name}", own.new_zeros(len(own), width)) for name, width in heads.items()]
            return torch.cat([own, *others], dim=1)

        return {view: whole(view, x) for view, x in gradients.items() if "." not in view}

    def _heads(self, view: str) -> Mapping[str, int]:
        return self.widths.get("text" if view in TEXTS else tower_of(view), {})

    def narrowed(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The features in bfloat16, as they travel between ranks; what doesn't travel stays as it is."""
        return {name: x if name.partition(".")[2] in self.exact else x.bfloat16() for name, x in features.items()}
