"""What the keys of the objective section must satisfy together, and with other sections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from dsclip.config.objective_section import (
    DISTILLING,
    SUPERVISED,
    TOWERS,
    VIEW_KEYS,
    ObjectiveSection,
    TermSection,
    ViewSection,
    head_of,
    tower_of,
)
from dsclip.config.schema import Recipe
from dsclip.errors import did_you_mean

Holds = Iterator[tuple[bool, str]]
# Whose features a term of dsclip's takes: those of heads of these kinds, and with None of a view itself; other terms take any.
KINDS: dict[str, tuple[str | None, ...]] = {
    "contrast": (None, "projector"),
    "supervised_contrast": (None, "projector"),
    "swav": ("prototypes",),
    "cross_entropy": ("classifier",),
    "distill": (None,),
    "distill_features": (None, "projector"),
}
# The keys that each of dsclip's terms has, of those that not all have.
KEYS = {
    "contrast": ("temperature", "duplicates"),
    "supervised_contrast": ("temperature", "mixup", "mixed", "focal"),
    "swav": ("temperature", "epsilon", "iterations"),
    "cross_entropy": ("label_smoothing",),
    "distill": ("temperature",),
    "distill_features": (),
}


def objective_rules(recipe: Recipe) -> Holds:
    """(whether it holds, a sentence for when it doesn't) of each rule."""
    objective = recipe.objective
    terms = [replace(term, weight=1.0) for term in objective.terms]
    twice = next((term.title for term in terms if terms.count(term) > 1), None)
    yield twice is None, f"`objective.terms` has {twice} twice; one with the sum of their weights does the same"
    yield (
        objective.pair_weight > 0 or bool(objective.terms),
        "`objective.pair_weight` is 0 and there are no `objective.terms`: nothing would be trained",
    )
    yield (
        objective.plugin is None or bool(objective.terms),
        f"`objective.plugin` {objective.plugin} registers terms, and `objective.terms` has none; name yours there",
    )
    yield (
        objective.teacher is None or bool(objective.teacher.strip()),
        "`objective.teacher` is empty; name a model's folder there, or `stored`, or leave it out",
    )
    if objective.teacher is not None and not objective.distils:
        hints = [(term.name, did_you_mean(term.name, list(DISTILLING))) for term in terms if term.name not in KEYS]
        misspelt = next(((name, hint) for name, hint in hints if hint), ("", ""))
        yield not misspelt[0], f"`objective.terms` has `{misspelt[0]}`, which does not distil.{misspelt[1]}"
    yield (
        objective.teacher is not None or not objective.distils,
        "`objective.terms` has a term that distils, and `objective.teacher` is not set; name a model's folder there, or `stored`",
    )
    yield (
        objective.distils or (objective.teacher is None and objective.teacher_temperature is None),
        "`objective.teacher` or `teacher_temperature` is set, and no term of `objective.terms` distils; add {name: distill, between: [image, text]}",
    )
    alone = next((term.title for term in objective.terms if term.name == SUPERVISED and len(term.between) == 1), None)
    yield (
        alone is None or recipe.data.group_key is not None or recipe.data.templates is not None,
        f"`objective.terms` has {alone}, whose positives are other samples of the same class, and nothing says which those are; set `data.group_key` "
        "or `data.templates`, or name a second view in its `between`",
    )
    views = [view.name for view in objective.views]
    unused = next((name for name in views if name not in objective.further_views), None)
    yield (
        unused is None,
        f"`objective.views` has {unused}, which no term compares; name it in a `between`, or leave it out",
    )
    yield len(set(views)) == len(views), "`objective.views` has one view twice; leave one of the two out"
    yield from _keys_of_views(objective.views)
    yield from _heads(objective)
    yield from _heads_elsewhere(recipe)


def _keys_of_views(views: Sequence[ViewSection]) -> Holds:
    for view in views:
        kind, other = ("image", "text") if view.name.startswith("image") else ("text", "image")
        wrong = next((key for key in VIEW_KEYS[other] if getattr(view, key) is not None), None)
        yield wrong is None, f"`objective.views` gives {view.name} `{wrong}`; {kind}s have {', '.join(VIEW_KEYS[kind])}"


def _heads(objective: ObjectiveSection) -> Holds:
    names = [head.name for head in objective.heads]
    yield len(set(names)) == len(names), "`objective.heads` has one name twice; rename one of the two"
    projectors = {head.name for head in objective.heads if head.kind == "projector"}
    for head in objective.heads:
        known = [*TOWERS, *(sorted(projectors) if head.kind != "projector" else ())]
        yield (
            head.of in known,
            f"`objective.heads`: {head.name} is `of: {head.of}`; a {head.kind} is of {' or '.join(known)}",
        )
        yield (
            head.hidden is None or head.kind == "projector",
            f"`objective.heads`: {head.name} has `hidden: {head.hidden}`, which belongs to a projector; put it `of` one, or leave `hidden` out",
        )
    widths = {head.width for head in objective.heads if head.kind == "classifier"}
    yield (
        len(widths) < 2,
        f"`objective.heads` has classifiers of {' and '.join(map(str, sorted(widths)))} classes, and a sample has one class; give one `width`",
    )
    for term in objective.terms:
        yield from _term(term)
        for feature in term.between:
            yield from _feature(objective, term.name, feature)
    used = {head_of(feature) for term in objective.terms for feature in term.between}
    used |= {head.of for head in objective.heads if head.name in used}
    unused = next((name for name in names if name not in used), None)
    yield (
        unused is None,
        f"`objective.heads` has {unused}, which no term takes features from: name it in a `between`, or leave it out",
    )


def _term(term: TermSection) -> Holds:
    known = KEYS.get(term.name)
    if known is None:
        return
    wrong = [
        key
        for key in sorted({key for keys in KEYS.values() for key in keys})
        if getattr(term, key) is not None and key not in known
    ]
    yield (
        not wrong,
        f"`objective.terms` gives {term.name} `{', '.join(wrong)}`; it has {', '.join(known) or 'none of these keys'}",
    )
    yield (
        term.mixed is None or term.mixup is not None,
        f"`objective.terms` gives {term.name} `mixed: {term.mixed}` without `mixup`; set `mixup: 1.0`, or leave `mixed` out",
    )


def _feature(objective: ObjectiveSection, term: str, feature: str) -> Holds:
    name, kind = head_of(feature), None
    if name is not None:
        head = next((head for head in objective.heads if head.name == name), None)
        known = ", ".join(head.name for head in objective.heads) or "there are none"
        yield (
            head is not None,
            f"`objective.terms` compares {feature}, and `objective.heads` has no {name}; known: {known}",
        )
        tower, kind = (objective.tower_of_head(head), head.kind) if head else ("", None)
        yield (
            tower == tower_of(feature),
            f"`objective.terms` compares {feature}, and the head {name} is of the {tower} tower",
        )
    wanted = KINDS.get(term, (kind,))
    words = " or ".join(f"those of a head of `kind: {x}`" for x in wanted if x is not None)
    yield (
        kind in wanted,
        f"`objective.terms` has {term} of {feature}, which {kind or 'no head'} makes; it takes {'a view itself or ' * (None in wanted)}{words}",
    )


def _heads_elsewhere(recipe: Recipe) -> Holds:
    objective, model, loss = recipe.objective, recipe.model, recipe.loss
    yield (
        not (model.lock_once and objective.heads_of(model.lock)),
        f"`model.lock_once` keeps features of the {model.lock} tower, and a head of it in `objective.heads` needs what they are made of. Leave "
        "out one of the two.",
    )
    yield (
        not objective.heads or loss.queue_momentum is None,
        f"`loss.queue_momentum` is {loss.queue_momentum}, and heads (`objective.heads`) have no moving average. Leave out the first; a queue "
        "goes without it.",
    )
