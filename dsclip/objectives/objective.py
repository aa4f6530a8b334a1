"""The objective of a step: the loss of the pairs and further terms, weighted and summed, with exact gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from dsclip.config.objective_section import ObjectiveSection
from dsclip.config.schema import Recipe
from dsclip.errors import UserError
from dsclip.losses import (
    Group,
    LossGrads,
    Negatives,
    Pairs,
    RegisteredLoss,
    check_options,
    checked,
    find_loss,
    with_prefixes,
)
from dsclip.objectives.contrast import Contrast
from dsclip.objectives.registry import make_term
from dsclip.objectives.supervised import SupervisedContrast
from dsclip.objectives.term import Features, TeacherFeatures, Term, TermGrads

GRADIENTS = ("loss", "d_image", "d_text", "d_hard_text", "d_log_scale", "d_bias")


@dataclass(frozen=True)
class ObjectiveGrads(LossGrads):
    """Of the weighted sum. d_views: gradients of further views, [n, D] each. values: each part by its name, unweighted."""

    d_views: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightedTerm:
    """title: of its value among a step's numbers. uses: the features that it may give gradients for."""

    name: str
    title: str
    uses: tuple[str, ...]
    weight: float
    term: Term


@dataclass(frozen=True)
class Objective:
    """w·loss(pairs) + Σ w_k·term_k(features). Without terms and with w = 1 it is the loss, bit for bit."""

    loss: RegisteredLoss
    negatives: Negatives
    pair_weight: float
    terms: tuple[WeightedTerm, ...]
    teacher_log_scale: float | None = None
    seed: int = 0

    @torch.no_grad()
    def __call__(
        self, pairs: Pairs, further: Mapping[str, Tensor], *, group: Group, step: int = 0,
        teacher: Mapping[str, Tensor] | None = None,
    ) -> ObjectiveGrads:  # fmt: skip
        """further: the views beyond image and text, and what heads give, [n, D] each. teacher: its `image` and `text`, [n, D'] each. Collective."""
        pair = checked(self.loss, pairs, negatives=self.negatives, group=group)
        total = ObjectiveGrads(**{f.name: getattr(pair, f.name) for f in fields(LossGrads)})
        if self.pair_weight != 1:
            present = [name for name in GRADIENTS if getattr(pair, name) is not None]
            total = replace(total, **{name: self.pair_weight * getattr(pair, name) for name in present})
        if not self.terms:
            return total
        taught = None
        if teacher is not None and self.teacher_log_scale is not None:
            taught = TeacherFeatures(teacher, self.teacher_log_scale)
        views = {"image": pairs.image, "text": pairs.text, **further}
        features = Features(views, pairs.log_scale, pairs.keys, pairs.classes, taught, (self.seed, step))
        sums = {name: torch.zeros_like(x, dtype=pair.d_image.dtype) for name, x in further.items()}
        sums |= {"image": total.d_image, "text": total.d_text}
        loss, d_log_scale, values = total.loss, total.d_log_scale, {"pair": pair.loss}
        for each in self.terms:
            grads = _checked(each, each.term(features, group=group), features)
            values[each.title] = grads.value
            loss = loss + each.weight * grads.value
            if grads.d_log_scale is not None:
                d_log_scale = d_log_scale + each.weight * grads.d_log_scale
            for name, grad in grads.d_views.items():
                sums[name] = sums[name] + each.weight * grad
        return replace(
            total, loss=loss, d_log_scale=d_log_scale, d_image=sums.pop("image"), d_text=sums.pop("text"), d_views=sums,
            values=values,
        )  # fmt: skip


def build_objective(recipe: Recipe, width: int) -> Objective:
    """The objective of a recipe. width: of a feature. Raises UserError for what loss or terms can't obey."""
    settings = recipe.loss
    loss = find_loss(settings.name, settings.plugin)
    check_options(loss, settings)
    negatives = Negatives(
        settings.duplicates, "own" if settings.hard_negatives == "own" else "global", settings.filter_margin,
        settings.beta, settings.label_smoothing, settings.debiased,
    )  # fmt: skip
    if loss.token_wise and recipe.model.lock_once:
        raise UserError(
            f"model.lock_once keeps one feature a caption or image, and loss.name={settings.name} compares those of all tokens"
        )
    if loss.token_wise and recipe.objective.terms:
        raise UserError(
            f"objective.terms compare one feature a sample, and loss.name={settings.name} makes one a token; leave them out, "
            "or take another loss"
        )
    terms = tuple(
        WeightedTerm(t.name, title, tuple(t.between), t.weight, make_term(t, negatives, recipe.objective.plugin))
        for title, t in zip(recipe.objective.titles, recipe.objective.terms, strict=True)
    )
    names, classes = recipe.data.classnames, recipe.objective.classes
    if classes and isinstance(names, list) and len(names) != classes:
        raise UserError(
            f"objective.heads: a classifier has {classes} classes, and the data {len(names)}; set its `width` to that"
        )
    for each in terms:
        _check_widths(each, recipe.objective, width)
    loss = with_prefixes(loss, settings, width)
    temperature = recipe.objective.teacher_temperature
    if recipe.objective.distils and temperature is None:
        raise UserError(
            "objective.teacher_temperature isn't known; set it, or let launchers/train.py take the teacher's own"
        )
    log_scale = None if temperature is None else -math.log(temperature)
    return Objective(loss, negatives, recipe.objective.pair_weight, terms, log_scale, recipe.train.seed)


def _check_widths(each: WeightedTerm, objective: ObjectiveSection, width: int) -> None:
    """What a contrast multiplies must be equally wide."""
    widths = [objective.width_of(name, width) for name in each.uses]
    if isinstance(each.term, Contrast | SupervisedContrast) and len(set(widths)) > 1:
        found = " and ".join(f"{name} {x} wide" for name, x in zip(each.uses, widths, strict=True))
        raise UserError(
            f"objective.terms: `{each.name}` multiplies features of one width, and {found}; change a head's `width`"
        )


def _checked(term: WeightedTerm, grads: TermGrads, features: Features) -> TermGrads:
    """Refuses what can't be a term's gradients, with a message that names the feature."""
    if not isinstance(grads, TermGrads):
        raise UserError(
            f"the term {term.title} returned {type(grads).__name__}; it must return dsclip.objectives.TermGrads"
        )
    if unknown := grads.d_views.keys() - set(term.uses):
        raise UserError(
            f"the term {term.title} returned a gradient for {min(unknown)}; name that feature in its `between`"
        )
    returned: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        name: (x, tuple(features[name].shape)) for name, x in grads.d_views.items()
    }
    returned["value"] = (grads.value, ())
    if grads.d_log_scale is not None:
        returned["d_log_scale"] = (grads.d_log_scale, ())
    for name, (x, shape) in returned.items():
        if not isinstance(x, Tensor) or tuple(x.shape) != shape:
            what = f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"as {type(x).__name__}"
            raise UserError(f"the term {term.title} returned {name} {what}; it must be a tensor of the shape {shape}")
    return grads
