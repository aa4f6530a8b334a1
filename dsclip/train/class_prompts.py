"""The sentences and names of `data.templates`, looked up before a run, so that its recipe says them."""

from __future__ import annotations

from dataclasses import replace

from dsclip.config.data_section import DataSection
from dsclip.data.loader import data_sets
from dsclip.data.shards.manifest import read_manifest
from dsclip.data.shards.specification import resolve_shards
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError
from dsclip.evaluate.tasks.templates import load_classnames, load_templates


def with_class_prompts(data: DataSection, storage: Storage) -> DataSection:
    """The section with lists in the place of a set's or a file's name, and of names that the shards' manifest has. Raises UserError."""
    if data.templates is None:
        return data
    return replace(
        data,
        templates=load_templates(data.templates),
        classnames=load_classnames(data.classnames) or _of_manifests(data, storage),
    )


def _of_manifests(data: DataSection, storage: Storage) -> list[str]:
    """Class names that the manifests of all sets agree on."""
    manifests = [read_manifest(resolve_shards(shards, storage), storage) for shards in data_sets(data)]
    found = [None if manifest is None else manifest.get("classes") for manifest in manifests]
    first = found[0]
    if not first or any(names != first for names in found):
        raise UserError(
            "`data.templates` makes captions of class names, and the training shards' manifests don't say one list of them. Give it as "
            "`data.classnames`, a file with one a line."
        )
    return first
