"""Captions of labelled images: sentences with the name of the class (FLYP, Goyal et al. 2023: fine-tune as the model was trained)."""

from __future__ import annotations

from dataclasses import dataclass

from dsclip.config.data_section import DataSection
from dsclip.data.decoding.sample import BadSample, RawSample, read_label
from dsclip.errors import UserError


@dataclass(frozen=True)
class ClassPrompts:
    """names: of the classes, in the order of their numbers; templates: sentences with {} where a name goes."""

    names: list[str]
    templates: list[str]

    def of(self, raw: RawSample) -> tuple[str, list[str]]:
        """(the name of the sample's class, its sentences). Raises BadSample for a sample without a class, or one without a name."""
        label = read_label(raw)
        if label is None:
            raise BadSample("no class")
        if label >= len(self.names):
            raise BadSample("class without a name")
        name = self.names[label]
        return name, [template.replace("{}", name) for template in self.templates]


def class_prompts(data: DataSection) -> ClassPrompts | None:
    """What `data.templates` says; None where samples have captions of their own. Raises UserError for names of sets and files, which a run
    has looked up before."""
    if data.templates is None:
        return None
    if not isinstance(data.templates, list) or not isinstance(data.classnames, list):
        raise UserError(
            "data.templates and data.classnames must be lists here: the sentences, and the names in their order"
        )
    return ClassPrompts(data.classnames, data.templates)
