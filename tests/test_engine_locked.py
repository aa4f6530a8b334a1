"""What the engine spares a tower that is locked as a whole, with the same step as a result."""

from dataclasses import replace

import pytest
import torch

from dsclip.bench.step import make_batch
from dsclip.config import load_ds_config, load_recipe
from dsclip.config.schema import BatchSection, LossSection, ModelSection, OptimSection, Recipe, TrainSection
from dsclip.data import Batch
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.errors import UserError
from dsclip.model import resolve_preset
from tests.distributed.launch import alone

CONFIG = resolve_preset("demo", vision_layers=2, text_layers=2)


def numbered(number: int) -> Batch:
    """Twelve samples with ids of their own."""
    return replace(make_batch(CONFIG, 12, number), sample_ids=torch.arange(12) + 100 * number)


def counted(
    lock: str, micro_batch_size: int | None, *, once: bool = False, batches: tuple[int, ...] = (0, 1)
) -> tuple[list[tuple[float, float]], dict[str, int]]:
    """(loss and gradient norm of the steps on these batches, captions or images that went through each tower's first block)."""
    recipe = Recipe(
        model=ModelSection(lock=lock, init="weights", lock_once=once), batch=BatchSection(12, micro_batch_size), optim=OptimSection(warmup_steps=0),
        train=TrainSection(steps=9, compile="off"),
    )  # fmt: skip
    settings = load_ds_config("ds_configs/zero1_bf16.json", recipe, 1)
    settings["bf16"] = {"enabled": False}
    seen = {"visual": 0, "text": 0}
    with alone():
        engine = ContrastiveEngine(recipe, settings, CONFIG)

        def count(name):
            def hook(_, inputs):
                seen[name] += sum(len(chunk) for chunk in inputs if chunk is not None and chunk.dim() == 3)

            return hook

        for name in seen:
            getattr(engine.module, name).blocks[0].register_forward_pre_hook(count(name))
        metrics = [engine.train_step(numbered(step)) for step in batches]
        steps = [(m.loss, m.grad_norm) for m in metrics]
        engine.close()
    return steps, seen


@pytest.mark.parametrize("lock, locked, other", [("image", "visual", "text"), ("text", "text", "visual")])
def test_micro_batches_of_a_locked_tower_run_once(lock, locked, other):
    whole, seen_whole = counted(lock, None)
    cut, seen = counted(lock, 4)
    assert seen_whole == {"visual": 24, "text": 24}
    assert seen == {locked: 24, other: 24 + 2 * 8}
    assert [x for step in cut for x in step] == pytest.approx([x for step in whole for x in step], rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("lock, locked, other", [("image", "visual", "text"), ("text", "text", "visual")])
def test_a_locked_tower_embeds_each_input_once_and_the_steps_are_the_same(lock, locked, other, micro_batch_size):
    epochs = (0, 1, 1, 0, 0)
    plain, _ = counted(lock, micro_batch_size, batches=epochs)
    once, seen = counted(lock, micro_batch_size, once=True, batches=epochs)
    assert seen[locked] == 24
    assert seen[other] == len(epochs) * (12 if micro_batch_size is None else 20)
    assert [x for step in once for x in step] == pytest.approx([x for step in plain for x in step], rel=1e-5)


@pytest.mark.parametrize(
    "keys, words",
    [
        (["model.lock_once=true"], "keeps the features of a tower that never changes; set `model.lock`"),
        (
            ["model.lock_once=true", "model.init=x", "model.lock=text", "model.unlocked_layers=1"],
            "without `model.unlocked_layers`",
        ),
        (["model.lock_once=true", "model.init=x", "model.lock=image"], "`data.crop_scale` draws them anew"),
        (
            ["model.lock_once=true", "model.init=x", "model.lock=image", "data.crop_scale=[1.0,1.0]", "data.flip=true"],
            "`data.flip` draws",
        ),
        (
            [
                "model.lock_once=true",
                "model.init=x",
                "model.lock=image",
                "data.crop_scale=[1.0,1.0]",
                "model.patch_dropout=0.5",
            ],
            "`model.patch_dropout` draws",
        ),
    ],
)
def test_what_would_keep_features_that_change_is_refused(keys, words):
    with pytest.raises(UserError, match=words):
        load_recipe("demo", keys)


@pytest.mark.parametrize(
    "lock, loss, config, words",
    [
        ("text", "filip", CONFIG, "keeps one feature a caption or image, and loss.name=filip"),
        ("image", "softmax", replace(CONFIG, patch_dropout=0.5), "needs model.patch_dropout 0"),
    ],
)
def test_what_has_no_one_feature_is_refused(lock, loss, config, words):
    recipe = Recipe(model=ModelSection(lock=lock, init="x", lock_once=True), loss=LossSection(name=loss))
    with alone(), pytest.raises(UserError, match=words):
        ContrastiveEngine(recipe, load_ds_config("ds_configs/zero1_bf16.json", recipe, 1), config)
