"""The DeepSpeed JSON: sizes from the recipe, typos and contradictions refused."""

import json
from pathlib import Path

import pytest

from dsclip.config import load_ds_config, load_recipe
from dsclip.config.deepspeed import packaged_ds_configs, resolve_persistence
from dsclip.errors import UserError

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def write(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def valid(**changes):
    return {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}} | changes


def test_packaged_configurations_are_found_by_name_and_documented():
    names = {"zero1_bf16", "zero2_bf16", "zero3_bf16", "zero3_offload_bf16", "zero3_persist_bf16"}
    assert set(packaged_ds_configs()) == names == {p.stem for p in CONFIGS}
    recipe, documented = load_recipe("demo"), (ROOT / "docs" / "training.md").read_text()
    for path in CONFIGS:
        assert load_ds_config(path.stem, recipe, 2) == load_ds_config(path, recipe, 2)
        assert f"`ds_configs/{path.name}`" in documented


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_sizes_are_resolved_from_the_recipe(path):
    recipe = load_recipe("demo", ["batch.global_batch_size=96"])
    config = load_ds_config(path, recipe, world_size=4)
    assert config["train_batch_size"] == 96
    assert config["train_micro_batch_size_per_gpu"] == 24
    assert config["gradient_accumulation_steps"] == 1
    config = resolve_persistence(config, recipe.batch)  # the engine's plan decides on the last one
    assert "auto" not in json.dumps(config)
    from deepspeed.runtime.config import DeepSpeedConfig  # DeepSpeed itself accepts every nested key

    DeepSpeedConfig(config | {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 24})


@pytest.mark.parametrize(
    "content, message",
    [
        (valid(gradient_cliping=1.0), "unknown key `gradient_cliping`. Did you mean `gradient_clipping`"),
        (valid(zero_optimisation={}), "Did you mean `zero_optimization`"),
        (valid(train_batch_size=100), "`train_batch_size` is 100, but the recipe gives 256"),
        (valid(train_micro_batch_size_per_gpu=3), "`train_micro_batch_size_per_gpu` is 3, but the recipe gives 128"),
        (valid(gradient_accumulation_steps=4), "batch.micro_batch_size"),
        (valid(fp16={"enabled": True}), "fp16 is not supported"),
        (valid(optimizer={"type": "Adam"}), "remove `optimizer`: the recipe's `optim` section"),
        (valid(scheduler={}), "remove `scheduler`"),
        ({"bf16": {"enabled": True}}, "zero_optimization.stage is 0; choose 1"),
        (valid(bf16={"enabled": True, "check_grad_overflow": False}), "remove bf16.check_grad_overflow"),
        (
            valid(zero_optimization={"stage": 2, "offload_param": {"device": "cpu"}}),
            "remove `zero_optimization.offload_param`: it works at stage 3",
        ),
        ({"zero_optimization": [3]}, "`zero_optimization` is [3]; it must be a section"),
        ('{"bf16": {}, "bf16": {}}', "key `bf16` stands there twice"),
        ('{\n"bf16": }', "line 2"),
        ("[1]", "holds no JSON object"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        load_ds_config(path, load_recipe("demo"), world_size=2)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="neither a file nor one that comes with dsclip"):
        load_ds_config(tmp_path / "nowhere.json", load_recipe("demo"), world_size=1)


def test_a_batch_that_ranks_cannot_share_names_those_they_can(tmp_path):
    with pytest.raises(UserError, match="use 255 or 258"):
        load_ds_config(write(tmp_path, valid()), load_recipe("demo"), world_size=3)


def test_nothing_is_clipped_unasked(tmp_path):
    assert load_ds_config(write(tmp_path, valid()), load_recipe("demo"), 1)["gradient_clipping"] == 0.0
