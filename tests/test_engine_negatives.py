"""The parts of the engine that carry negatives and scalars: queue, temperature, and what TensorBoard is told."""

import pytest
import torch

from dsclip.bench.step import make_batch
from dsclip.config import load_ds_config
from dsclip.config.schema import BatchSection, LossSection, OptimSection, Recipe
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.feature_queue import FeatureQueue
from dsclip.engine.loss_scalars import LossScalars
from dsclip.errors import UserError
from dsclip.losses import LossGrads
from dsclip.model import resolve_preset
from dsclip.saving import WriteNow
from tests.distributed.launch import alone

CPU = torch.device("cpu")
SINGLE = Collectives.single()


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 2)


def push(queue, *values):
    queue.push(rows(*values), -rows(*values), torch.tensor(values), SINGLE)


def kept(queue, step=0):
    return sorted(queue.negatives(step).get("queue_image", torch.zeros(0, 2))[:, 0].tolist())


def test_the_queue_keeps_the_newest_pairs_together():
    queue = FeatureQueue(LossSection(queue_size=5), (2,), (2,), CPU)
    push(queue, 1, 2, 3)
    assert queue.negatives(0) == {}, "until it is full it stays unused"
    push(queue, 4, 5, 6)
    assert kept(queue) == [2, 3, 4, 5, 6]
    push(queue, 7)
    assert kept(queue) == [3, 4, 5, 6, 7]
    found = queue.negatives(0)
    assert torch.equal(found["queue_image"], -found["queue_text"])
    assert torch.equal(found["queue_keys"], found["queue_image"][:, 0].long())
    push(queue, *range(10, 19))
    assert kept(queue) == [14, 15, 16, 17, 18]


def test_a_queue_with_warm_up_steps_is_used_from_that_step():
    queue = FeatureQueue(LossSection(queue_size=5, queue_warmup_steps=3), (2,), (2,), CPU)
    push(queue, 1, 2)
    assert kept(queue, step=2) == [] and kept(queue, step=3) == [1, 2]


def test_a_queue_comes_back_from_disk(tmp_path):
    queue = FeatureQueue(LossSection(queue_size=3), (2,), (2,), CPU)
    push(queue, 1, 2, 3, 4)
    state = queue.save(WriteNow(), tmp_path)
    again = FeatureQueue(LossSection(queue_size=3), (2,), (2,), CPU)
    again.load(tmp_path, state)
    push(queue, 5), push(again, 5)
    assert kept(again) == kept(queue) == [3, 4, 5]
    with pytest.raises(UserError, match="same size"):
        FeatureQueue(LossSection(queue_size=4), (2,), (2,), CPU).load(tmp_path, state)


def test_a_queue_larger_than_memory_is_refused():
    with pytest.raises(UserError, match="choose a smaller queue"):
        FeatureQueue(LossSection(queue_size=10**11), (512,), (512,), CPU)


def scalars(steps=11, has_bias=False, **loss):
    return LossScalars(LossSection(**loss), OptimSection(lr=0.1), steps, CPU, has_bias=has_bias)


def gradients(d_log_scale, d_bias=None):
    zero = torch.zeros(())
    return LossGrads(zero, zero, zero, torch.tensor(d_log_scale), zero, zero, d_bias)


def test_a_learned_temperature_follows_its_gradient_and_is_clamped():
    learned = scalars(init_temperature=0.1, max_logit_scale=11.0)
    learned.step(gradients(-1.0), lr=0.05)
    assert 10 < learned.scale < 11
    for _ in range(5):
        learned.step(gradients(-1.0), lr=0.05)
    assert learned.scale == pytest.approx(11.0)


def test_a_fixed_temperature_stays():
    fixed = scalars(temperature="fixed", init_temperature=0.1)
    fixed.step(gradients(-1.0), lr=0.1)
    assert fixed.scale == pytest.approx(10.0)


def test_a_scheduled_temperature_goes_evenly_in_its_logarithm():
    scheduled = scalars(temperature="scheduled", init_temperature=0.1, final_temperature=0.025)
    seen = []
    for step in (0, 5, 10):
        scheduled.before_step(step)
        scheduled.step(gradients(-1.0), lr=0.1)
        seen.append(scheduled.scale)
    assert seen == pytest.approx([10.0, 20.0, 40.0])


def test_the_bias_is_learned_and_both_come_back():
    first = scalars(has_bias=True)
    first.step(gradients(0.3, torch.tensor(0.2)), lr=0.1)
    assert first.bias.item() == pytest.approx(-10.1, abs=1e-4)
    second = scalars(has_bias=True)
    second.load_state(first.state())
    for each in (first, second):
        each.step(gradients(-0.7, torch.tensor(0.9)), lr=0.1)
    assert first.state() == second.state()


@pytest.mark.parametrize("loss, field", [({"hard_negatives": "own"}, "hard_owner"), ({"duplicates": "mask"}, "keys")])
def test_what_a_batch_lacks_for_the_loss_is_said(loss, field):
    recipe = Recipe(batch=BatchSection(4), loss=LossSection(**loss))
    ds_config = load_ds_config("ds_configs/zero1_bf16.json", recipe, 1)
    with alone():
        engine = ContrastiveEngine(recipe, ds_config, resolve_preset("demo"))
        try:
            with pytest.raises(UserError, match=f"needs batch.{field}, which is missing"):
                engine.train_step(make_batch(engine.config, 4, 0))
        finally:
            engine.close()
