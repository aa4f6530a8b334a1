"""Recipes are read strictly: what can't be obeyed is refused with one clear sentence."""

import dataclasses
import json

import pytest

from dsclip.config import Recipe, dump_recipe, load_recipe, packaged_recipes
from dsclip.config.synonyms import CONVERTED, EPOCHS, MEANS
from dsclip.errors import UserError


def recipe_file(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_load_and_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert load_recipe(recipe_file(tmp_path, dump_recipe(recipe))) == recipe


def test_defaults_file_and_overrides_are_applied_in_that_order(tmp_path):
    path = recipe_file(tmp_path, "optim: {lr: 1e-3, warmup_steps: 5}\n")
    recipe = load_recipe(
        path, ["optim.lr=2e-4", "train.name=x1", "eval.zeroshot_shards=[a.tar, b.tar]", "train.seed=7"]
    )
    assert (recipe.optim.lr, recipe.optim.warmup_steps, recipe.train.name, recipe.train.seed) == (2e-4, 5, "x1", 7)
    assert recipe.eval.zeroshot_shards == ["a.tar", "b.tar"]
    assert recipe.optim.beta2 == Recipe().optim.beta2


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe().optim.lr = 1.0


@pytest.mark.parametrize("text, value", [("1e-3", 1e-3), ("5", 5.0), ("2.5e+2", 250.0), ("1E4", 1e4)])
def test_numbers_are_numbers(tmp_path, text, value):
    recipe = load_recipe(recipe_file(tmp_path, f"optim: {{lr: {text}, warmup_steps: 0}}"))
    assert recipe.optim.lr == value and isinstance(recipe.optim.lr, float)


def test_words_that_yaml_takes_for_booleans_stay_words(tmp_path):
    assert load_recipe(recipe_file(tmp_path, "train: {name: no}\noptim: {warmup_steps: 0}")).train.name == "no"


@pytest.mark.parametrize(
    "text, message",
    [
        ("optim: {learning_rate: 1}", "unknown key `optim.learning_rate`. Did you mean `optim.lr`?"),
        ("learning_rate: 1", "unknown section `learning_rate`. Did you mean `optim.lr`?"),
        ("optim: {warmup_step: 1}", "Did you mean `warmup_steps`"),
        ("optimm: {lr: 1}", "unknown section `optimm`. Did you mean `optim`"),
        ("optim:\n  lr: 1\n  lr: 2", "line 3: key `lr` stands here twice"),
        ("optim: {lr: fast}", "`optim.lr` is 'fast'; it must be float"),
        ("train: {steps: 10.5}", "`train.steps` is 10.5; it must be int"),
        ("train: {steps: true}", "`train.steps` is True; it must be int"),
        ("optim: 3", "`optim` is a section"),
        ("- optim", "holds no sections"),
        ("optim: {lr: [1", "recipe.yaml, line"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("optim: !!python/object/apply:os.system [ls]", "recipe.yaml, line 1"),
        ("batch: {global_batch_size: 0}", "`batch.global_batch_size` is 0; it must be greater than 0"),
        ("batch: {global_batch_size: 8, micro_batch_size: 16}", "exceeds `batch.global_batch_size` 8"),
        ("batch: {micro_batch_size: 8, chunk_size: 16}", "`batch.chunk_size` 16 exceeds"),
        ("optim: {warmup_steps: 5000}\ntrain: {steps: 100}", "would never be reached"),
        (
            "data: {order: stream}\ntrain: {on_spike: rollback}",
            "leaves out single batches, and with `data.order: stream`",
        ),
        ("train: {on_spike: rollback, keep_checkpoints: 1}", "set `train.keep_checkpoints` to 2 or more"),
        (
            "train: {on_spike: rollback, spike_window: 9999}",
            "follows two steps after the first `train.spike_window` (9999), and `train.steps` is 10000",
        ),
        ("train: {on_nonfinite: rollback, max_nonfinite_steps: null}", "which is null; give a number"),
        ("optim: {layer_decay: 0}", "`optim.layer_decay` is 0; it must be greater than 0"),
        ("optim: {rules: [{match: text, lr: 1}]}", "give a list of {match: REGULAR EXPRESSION, lr_scale: NUMBER"),
        ("optim: {rules: [{match: '(', lr_scale: 1}]}", "give a list of {match: REGULAR EXPRESSION"),
        ("optim: {rules: [{match: text}]}", "with one number or both"),
        ("optim: {rules: [{match: text, lr_scale: -1}]}", "0 or more"),
        ("optim: {rules: [{match: '', lr_scale: 2}]}", "give a list of {match: REGULAR EXPRESSION"),
        ("optim: {rules: text}", "`optim.rules` is 'text'; give a list of {match: REGULAR EXPRESSION"),
        ("optim: {rules: [text]}", "`optim.rules` is ['text']; give a list of {match: REGULAR EXPRESSION"),
        ("optim: {rules: [{match: text, lr_scale: [1]}]}", "give a list of {match: REGULAR EXPRESSION"),
        ("optim: {schedule: cosin}", "Did you mean `cosine`"),
        ("optim: {decay_share: 0.1}", "`optim.decay_share` is 0.1; it belongs to `optim.schedule: wsd`"),
        ("optim: {schedule: wsd, warmup_steps: 85}\ntrain: {steps: 100}", "85 and the decay of 20 steps exceed"),
        (
            "optim: {schedule: wsd, warmup_steps: 0, decay_share: 0.01}\ntrain: {steps: 100}",
            "its decay is 1 of 100 steps",
        ),
        ("optim: {schedule: inverse_sqrt, warmup_steps: 0}", "Give a warm-up"),
        ("optim: {schedule: constant, min_lr: 1e-5}", "`optim.schedule: constant` does not fall"),
        ("train: {name: ../evil}", "`train.name` is '../evil'"),
        ("data: {crop_scale: [0.9]}", "`data.crop_scale` is [0.9]"),
        ("data: {crop_scale: [0.9, x]}", "`data.crop_scale[1]` is 'x'; it must be float"),
        ("data: {train_shards: [a.tar, 3]}", "`data.train_shards[1]` is 3; it must be str"),
        ("data: {train_shards: 3}", "`data.train_shards` is 3; it must be str or list[str]"),
        ("data: {weights: [0, 0]}", "`data.weights` is [0, 0]; give numbers that are not negative, not all 0"),
        ("data: {color_jitter: [0.1, 0.1, 0.1, 0.6]}", "hue at most 0.5"),
        ("data: {max_bad_fraction: 1.5}", "`data.max_bad_fraction` is 1.5; it must be between 0 and 1"),
        ("data: {workers: null}", "`data.workers` is None; it must be int"),
        ("optim: {weight_decay: .nan}", "`optim.weight_decay` is nan; it must be 0 or more"),
        ("loss: {init_bias: .inf}", "`loss.init_bias` is inf; it must be a finite number"),
        ("loss: {temperature: 1}", "`loss.temperature` is 1; it must be str"),
        ("loss: {queue_momentum: 0.9}", "it needs `loss.queue_size`"),
        ("loss: {final_temperature: 0.01}", "set both or neither"),
        ("batch: {chunk_size: many}", "`batch.chunk_size` is 'many'; it must be int or null"),
        ("model: {activation: relu}", "Choose from: gelu, quick_gelu"),
        ("model: {image_mean: [0.5]}", "`model.image_mean` is [0.5]; give three numbers"),
        ("optim: {beta1: 1.5, warmup_steps: 0}", "must be in [0, 1)"),
        ("train: {seed: -1}\noptim: {warmup_steps: 0}", "`train.seed` is -1; it must be between 0 and 2^63 - 1"),
        ("batch: {global_batch_size: 1000000000000}", "it must be greater than 0 and at most 16777216"),
        (
            "model: {vision_layers: 100000}\noptim: {warmup_steps: 0}",
            "`model.vision_layers` is 100000; it must be greater than 0 and at most 1000",
        ),
    ],
)
def test_bad_recipes_are_refused_with_the_reason(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load_recipe(recipe_file(tmp_path, text))
    assert message in str(error.value)
    assert "recipe.yaml" in str(error.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("lr=1", "write section.key=value"),
        ("lr=1e-3", "Did you mean `optim.lr`?"),
        ("learning_rate=1e-3", "Did you mean `optim.lr`?"),
        ("train.learning_rate=1e-3", "Did you mean `optim.lr`?"),
        ("optim.wd=0.1", "Did you mean `optim.weight_decay`?"),
        ("train.samples_per_forward=4", "Did you mean `batch.micro_batch_size`?"),
        ("optim.warmup=10", "Did you mean `optim.warmup_steps`?"),
        ("train.batch_size=64", "Did you mean `batch.global_batch_size`?"),
        ("train.lr=1e-3", "Did you mean `optim.lr`?"),
        ("data.num_workers=2", "Did you mean `data.workers`?"),
        ("train.accum_freq=4", "Set `batch.global_batch_size` to all samples of a step"),
        ("train.precision=amp", "The DeepSpeed JSON decides"),
        ("epochs=3", "Set `train.steps`: 3 × samples / 256, the global batch"),
        ("optim.lr", "write section.key=value"),
        ("optim.lrr=1", "Did you mean `lr`"),
        ("optim.lr=[1", "`optim.lr=[1`"),
    ],
)
def test_bad_overrides_are_refused(override, message):
    with pytest.raises(UserError) as error:
        load_recipe("demo", [override])
    assert message in str(error.value)


def test_unknown_recipe_names_suggest_packaged_ones():
    with pytest.raises(UserError, match="Did you mean `demo`"):
        load_recipe("demmo")


def test_epochs_are_converted_with_the_batch_and_the_samples_of_the_data(tmp_path):
    shards = [{"name": f"{i}.tar", "samples": 500} for i in range(2)]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    for override in ("train.epochs=10", "num_epochs=10"):
        with pytest.raises(UserError, match="`train.steps=157`: 10 × 1000 samples / a global batch of 64"):
            load_recipe("demo", [f"data.train_shards={tmp_path}", "batch.global_batch_size=64", override])


def test_an_old_name_is_read_with_one_warning_that_names_the_new_key(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dsclip.config.old_names._warned", set())
    old = recipe_file(tmp_path, "batch: {samples_per_forward: 16}\noptim: {warmup_steps: 0}")
    assert load_recipe(old).batch.micro_batch_size == 16
    assert load_recipe(old, ["batch.micro_batch_size=8"]).batch.micro_batch_size == 8
    assert load_recipe("demo", ["batch.samples_per_forward=4"]).batch.micro_batch_size == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "`batch.samples_per_forward` is now called `batch.micro_batch_size`" in said
    with pytest.raises(UserError, match="`batch.samples_per_forward` is the old name of `batch.micro_batch_size`"):
        load_recipe(recipe_file(tmp_path, "batch: {samples_per_forward: 16, micro_batch_size: 16}"))


def test_ranks_other_than_the_first_read_an_old_name_in_silence(capsys, monkeypatch):
    monkeypatch.setattr("dsclip.config.old_names._warned", set())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load_recipe("demo", ["batch.samples_per_forward=4"]).batch.micro_batch_size == 4
    assert capsys.readouterr().err == ""


def test_every_synonym_stands_for_a_key_that_exists():
    known = {f"{s}.{key}" for s, keys in dataclasses.asdict(Recipe()).items() for key in keys}
    assert set(MEANS.values()) <= known and not {word for word in MEANS if word in EPOCHS or word in CONVERTED}
