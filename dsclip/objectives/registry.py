"""Terms by name: the built-in ones, and those that users register."""

from __future__ import annotations

from dsclip.config.objective_section import TermSection
from dsclip.errors import UserError, did_you_mean
from dsclip.losses import Negatives
from dsclip.losses.plugin import import_plugin
from dsclip.objectives.contrast import contrast
from dsclip.objectives.cross_entropy import cross_entropy
from dsclip.objectives.distill import distill, distill_features
from dsclip.objectives.supervised import supervised_contrast
from dsclip.objectives.swav import swav
from dsclip.objectives.term import Term, TermFactory

_TERMS: dict[str, TermFactory] = {
    "contrast": contrast, "supervised_contrast": supervised_contrast, "swav": swav, "cross_entropy": cross_entropy, "distill": distill,
    "distill_features": distill_features,
}  # fmt: skip


def register_term(name: str, factory: TermFactory) -> TermFactory:
    """Makes a term known under `name`, for `name` in an element of `objective.terms`; gives the factory back.

    factory(settings, negatives) -> term; term(features, *, group) -> TermGrads. Raises UserError for a name that is taken.
    """
    if name in _TERMS and _TERMS[name] is not factory:
        raise UserError(f"a term named `{name}` is registered already; choose another name")
    _TERMS[name] = factory
    return factory


def make_term(settings: TermSection, negatives: Negatives, plugin: str | None = None) -> Term:
    """The term of an element of `objective.terms`, after importing `plugin`, which registers its own."""
    if plugin is not None:
        import_plugin(plugin, "objective.plugin")
    if settings.name not in _TERMS:
        raise UserError(
            f"objective.terms: `{settings.name}` is not registered.{did_you_mean(settings.name, list(_TERMS))} "
            f"Known: {', '.join(sorted(_TERMS))}. Your own: register it with dsclip.objectives.register_term and name its "
            "file in objective.plugin"
        )
    try:
        return _TERMS[settings.name](settings, negatives)
    except UserError:
        raise
    except Exception as error:  # a user's own code
        raise UserError(
            f"objective.terms: `{settings.name}` can't be made of {settings.between}: {type(error).__name__}: {error}"
        ) from error
