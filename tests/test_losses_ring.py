"""Features that pass round a ring: the same losses and gradients, and no rank ever holds all candidates."""

import math
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsclip import losses
from dsclip.config.schema import LossSection
from dsclip.distributed import Collectives
from dsclip.engine.feature_queue import FeatureQueue
from dsclip.errors import UserError
from dsclip.losses import Negatives, Pairs
from dsclip.losses.blocks import blocks
from tests.test_losses import LOSSES, OBEYED, OPTIONS, Case, unit
from tests.test_losses_registry import DENSE
from tests.thread_ranks import ThreadRanks


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("name", "option"), OBEYED)
def test_every_loss_with_every_option_equals_its_reference_in_a_ring(name, option, world_size):
    Case(name, world_size, 8 // world_size).check(OPTIONS[option], tile_entries=12, in_ring=True)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(LOSSES), world_size=st.integers(2, 6), local=st.integers(1, 4), tile_entries=st.integers(1, 99),
    seed=st.integers(0, 999), duplicates=st.sampled_from(["negative", "positive", "mask"]),
    hard=st.sampled_from(["global", "own"]), beta=st.sampled_from([0, 0.4]),
)  # fmt: skip
def test_any_number_of_ranks(name, world_size, local, tile_entries, seed, duplicates, hard, beta):
    case = Case(name, world_size, local, seed=seed)
    case.check(Negatives(duplicates, hard, beta=beta), tile_entries, dict(rtol=1e-7, atol=1e-8), in_ring=True)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_in_float32_and_from_bf16_it_is_as_close_as_all_at_once(name, dtype, world_size):
    case = Case(name, world_size, 8 // world_size, dtype=dtype)
    case.queue = (case.queue[0].float(), case.queue[1].float(), case.queue[2])
    if case.bias is not None:
        case.bias = case.bias.float()
    case.log_scale = case.log_scale.float()
    ring, whole = (case.ours(OPTIONS["everything"], 12, in_ring=r) for r in (True, False))
    for ours, theirs in zip(ring, whole, strict=True):
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
        for field in ("d_image", "d_text", "d_hard_text", "d_log_scale"):
            torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), rtol=1e-4, atol=1e-6)
        assert (ours.correct_image, ours.masked) == (theirs.correct_image, theirs.masked)


class Watch(TorchDispatchMode):
    """What is allocated in this thread: the largest storage, and the most that lived at a time, in bytes."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self._seen, self._lock = set(), threading.Lock()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._saw(tensor.untyped_storage())
        return result

    def _saw(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        weakref.finalize(storage, self._gone, key, size)
        self.alive += size
        self.largest, self.peak = max(self.largest, size), max(self.peak, self.alive)

    def _gone(self, key, size):
        self._seen.discard(key)
        self.alive -= size


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_no_rank_ever_holds_the_features_of_all(name, hard):
    ranks, local, width = 6, 32, 128
    whole, block = ranks * local * width * 4, local * width * 4
    image, text, wrong = (unit(ranks, local, width, seed=seed, dtype=torch.float32) for seed in range(3))

    def watched(group):
        extra = dict(hard_text=wrong[group.rank].clone(), hard_owner=torch.arange(local)) if hard else {}
        scalars = torch.tensor(math.log(14.0)), torch.tensor(-10.0)
        pairs = Pairs(image[group.rank].clone(), text[group.rank].clone(), *scalars, **extra)
        with Watch() as watch:
            losses.find_loss(name)(pairs, group=group, tile_entries=1024)
        return watch

    kinds = 3 if hard else 2
    for watch in ThreadRanks(ranks, in_ring=True).run(watched):
        assert watch.largest <= block, "no tensor is larger than one rank's features"
        # Of each kind its own, two on their way and the gradient; beside them what a tile takes.
        assert watch.peak <= (4 * kinds + 3) * block < kinds * whole
    for watch in ThreadRanks(ranks).run(watched):
        assert watch.largest >= whole and watch.peak >= kinds * whole, "all at once it does: the watch sees it"


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_every_block_passes_every_rank_and_two_are_allocated(world_size):
    def passed(group):
        mine, sends = torch.full((4, 2), group.rank), []
        pass_on, group.pass_on = group.pass_on, lambda *tensors: (sends.append(1), pass_on(*tensors))[1]
        seen, places = [], set()
        for rank, (block,) in blocks([mine], group):
            assert (block == rank).all()
            seen.append(rank)
            places.add(block.data_ptr())
        assert (mine == group.rank).all()
        return seen, len(places), len(sends)

    for rank, (seen, places, sends) in enumerate(ThreadRanks(world_size, in_ring=True).run(passed)):
        assert seen == [(rank - distance) % world_size for distance in range(world_size)]
        assert places == min(3, world_size), "this rank's own and two others"
        assert sends == world_size - 1


def test_all_at_once_is_one_block():
    def gathered(group):
        return [(rank, *tensors) for rank, tensors in blocks([torch.full((2,), group.rank)], group)]

    for ((rank, block),) in ThreadRanks(3).run(gathered):
        assert rank == 0 and block.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("size", [3, 8, 11, 30])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_queue_that_is_filled_from_a_ring_is_the_same(world_size, size):
    def filled(group):
        queue = FeatureQueue(LossSection(queue_size=size), (3,), (3,), torch.device("cpu"))
        for step in range(4):
            whole = torch.arange(24.0 * 3).view(24, 3) + 100 * step
            mine = whole.view(world_size, -1, 3)[group.rank]
            queue.push(mine, -mine, mine[:, 0].long(), group)
        return queue

    for ring, whole in zip(*(ThreadRanks(world_size, r).run(filled) for r in (True, False)), strict=True):
        assert ring.state() == whole.state()
        for name, x in ring._tensors.items():
            assert torch.equal(x, whole._tensors[name])
    last = torch.arange(24.0 * 3).view(24, 3)[-min(size, 24) :] + 300
    rows = {tuple(row) for row in whole._tensors["image"].tolist()}
    assert {tuple(row) for row in last.tolist()} <= rows


def test_who_needs_all_features_refuses_a_ring():
    losses.register("dense in a ring", DENSE)
    with pytest.raises(UserError, match="loss.gather=ring can't be obeyed by the loss `dense in a ring`"):
        losses.check_options(losses.find_loss("dense in a ring"), LossSection(name="dense in a ring", gather="ring"))
    with pytest.raises(UserError, match="gather=ring"):
        DENSE(Case("softmax", 1, 3, extras=False).pairs(0), group=Collectives(in_ring=True))
    for name in LOSSES:
        losses.check_options(losses.find_loss(name), LossSection(name=name, gather="ring"))
    with pytest.raises(ValueError, match="nobody"):
        losses.SingleRank().pass_on([], [])
