"""Sections made in code: checked as those of a file, and plain frozen dataclasses otherwise."""

import dataclasses
import time
import typing

import pytest
from pydantic import ValidationError

from dsclip.config import Recipe
from dsclip.config.describe import Allowed, allowed
from dsclip.config.schema import BatchSection, DataSection, LossSection, OptimSection

SECTIONS = {name: cls for name, cls in typing.get_type_hints(Recipe).items()}


@pytest.mark.parametrize("name", SECTIONS)
def test_every_default_is_a_value_that_its_own_field_accepts(name):
    default = SECTIONS[name]()
    assert SECTIONS[name](**dataclasses.asdict(default)) == default
    assert dataclasses.replace(default) == default


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_has_a_sentence(name):
    sentences = {key: field.description for key, field in SECTIONS[name].__pydantic_fields__.items()}
    assert sentences and not [key for key, text in sentences.items() if not (text and text.endswith("."))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: BatchSection("2"), lambda: BatchSection(True), lambda: BatchSection(2.0), lambda: BatchSection(0),
        lambda: BatchSection(checkpointing="some"), lambda: OptimSection(lr=float("nan")), lambda: OptimSection(lr=True),
        lambda: dataclasses.replace(LossSection(), beta=-1), lambda: DataSection(crop_scale=[0.9, 0.5]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_where_it_is_set(make):
    with pytest.raises(ValidationError):
        make()


def test_integers_are_fine_as_floats_and_nothing_else_changes_its_type():
    section = OptimSection(lr=1)
    assert section.lr == 1.0 and isinstance(section.lr, float) and BatchSection(16, 8).micro_batch_size == 8


def test_two_sections_do_not_share_a_list():
    DataSection().trusted_hosts.append("a")
    given = [0.5, 1.0]
    section = DataSection(crop_scale=given)
    given[0] = 2.0
    assert DataSection().trusted_hosts == [] and section.crop_scale == [0.5, 1.0]


def test_a_section_takes_microseconds():
    """A plan tries hundreds."""
    start = time.process_time()
    for size in range(1, 1001):
        BatchSection(size)
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("section", "key", "expected"),
    [
        ("batch", "micro_batch_size", Allowed(("int", "null"), (), "greater than 0", "")),
        ("train", "seed", Allowed(("int",), (), "between 0 and 2^63 - 1", "")),
        ("optim", "beta1", Allowed(("float",), (), "in [0, 1)", "")),
        ("loss", "wire_dtype", Allowed(("str",), ("fp32", "bf16"), "", "")),
        ("data", "train_shards", Allowed(("str", "list[str]"), (), "", "")),
        ("data", "crop_scale", Allowed(("list[float]",), (), "", "[low, high] within (0, 1]")),
        ("loss", "beta", Allowed(("float",), (), "0 or more", "")),
    ],
)
def test_what_a_key_allows_is_said_in_words(section, key, expected):
    assert allowed(typing.get_type_hints(SECTIONS[section], include_extras=True)[key]) == expected
