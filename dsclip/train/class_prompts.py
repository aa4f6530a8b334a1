"""The sentences and names of `data.templates`, looked up before a run, so that its recipe says them."""

from __future__ import annotations

from dataclasses import replace

from dsclip.config.data_section import DataSection
from dsclip.data.ordered_sets import data_sets
from dsclip.data.shards.manifest import read_manifest
from dsclip.data.shards.specification import resolve_shards
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError
from dsclip.evaluate.tasks.templates import load_classnames, load_templates


def with_class_prompts(data: DataSection, storage: Storage) -> DataSection:
    """The section with lists in the place of a set's or a file's name, and of names that the shards' manifest has. Raises UserError."""
    if data.templates is None:
        return data
    names = load_classnames(data.classnames)
    known = _of_manifests(data, storage)
    if names is None and known is None:
        raise UserError(
            "`data.templates` makes captions of class names, and the training shards' manifests don't say one list of them. Give it as "
            "`data.classnames`, a file with one a line."
        )
    if names is not None and known is not None and len(names) != len(known):
        raise UserError(
            f"`data.classnames` has {len(names)} names, and the training shards' manifests say {len(known)} classes; give a name for each"
        )
    return replace(data, templates=load_templates(data.templates), classnames=names or known)


def _of_manifests(data: DataSection, storage: Storage) -> list[str] | None:
    """Class names that the manifests of all sets agree on; None where there are none."""
    manifests = [read_manifest(resolve_shards(shards, storage), storage) for shards in data_sets(data)]
    found = [None if manifest is None else manifest.get("classes") for manifest in manifests]
    return found[0] if found[0] and all(names == found[0] for names in found) else None
