"""What the engine spares a tower that is locked as a whole, with the same step as a result."""

import pytest

from dsclip.bench.step import make_batch
from dsclip.config import load_ds_config
from dsclip.config.schema import BatchSection, ModelSection, OptimSection, Recipe, TrainSection
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.model import resolve_preset
from tests.distributed.launch import alone

CONFIG = resolve_preset("demo", vision_layers=2, text_layers=2)


def counted(lock: str, micro_batch_size: int | None) -> tuple[list[tuple[float, float]], dict[str, int]]:
    """(loss and gradient norm of two steps, captions or images that went through each tower's first block)."""
    recipe = Recipe(
        model=ModelSection(lock=lock, init="weights"), batch=BatchSection(12, micro_batch_size), optim=OptimSection(warmup_steps=0),
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
        metrics = [engine.train_step(make_batch(CONFIG, 12, step)) for step in range(2)]
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
