"""The softmax loss against dense InfoNCE with autograd in float64, also on several ranks (threads as ranks)."""

import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.losses import softmax_contrastive


def unit(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


def reference(image, text, log_scale):
    image, text, log_scale = (x.detach().double().requires_grad_() for x in (image, text, log_scale))
    logits = log_scale.exp() * image @ text.T
    target = torch.arange(len(image))
    loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
    loss.backward()
    return loss.detach(), image.grad, text.grad, log_scale.grad


class ThreadRanks:
    """Real all-gathers and sums between threads, so that ranks cost no process."""

    def __init__(self, world_size):
        self.world_size, self.barrier, self.slots = world_size, threading.Barrier(world_size), [None] * world_size

    def run(self, function):
        results = [None] * self.world_size

        def work(rank):
            results[rank] = function(ThreadRank(self, rank))

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.world_size)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        return results


class ThreadRank:
    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.world_size = ranks, rank, ranks.world_size

    def _exchange(self, x):
        self.ranks.slots[self.rank] = x
        self.ranks.barrier.wait()
        values = list(self.ranks.slots)
        self.ranks.barrier.wait()
        return values

    def all_gather(self, x):
        return torch.cat(self._exchange(x))

    def all_reduce_sum(self, x):
        return torch.stack(self._exchange(x)).sum(dim=0)


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 4]), local=st.integers(1, 9), width=st.integers(2, 17),
    tile_rows=st.integers(1, 12), scale=st.floats(1, 1000), seed=st.integers(0, 999),
)  # fmt: skip
def test_loss_and_gradients_equal_dense_autograd(world_size, local, width, tile_rows, scale, seed):
    total = world_size * local
    image, text = unit(total, width, seed=seed), unit(total, width, seed=seed + 1)
    log_scale = torch.tensor(math.log(scale), dtype=torch.float64)

    def one_rank(group):
        rows = slice(group.rank * local, (group.rank + 1) * local)
        return softmax_contrastive(image[rows], text[rows], log_scale, group=group, tile_rows=tile_rows)

    results = ThreadRanks(world_size).run(one_rank)
    loss, d_image, d_text, d_log_scale = reference(image, text, log_scale)
    close = dict(rtol=1e-9, atol=1e-10)
    for result in results:
        torch.testing.assert_close(result.loss, loss, **close)
        torch.testing.assert_close(result.d_log_scale, d_log_scale, **close)
    torch.testing.assert_close(torch.cat([r.d_image for r in results]), d_image, **close)
    torch.testing.assert_close(torch.cat([r.d_text for r in results]), d_text, **close)


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_float32_stays_finite_and_close_at_large_scales(scale):
    image = unit(64, 16, dtype=torch.float32)
    log_scale = torch.tensor(math.log(scale))
    ours = softmax_contrastive(image, image, log_scale)
    loss, d_image, _, _ = reference(image, image, log_scale)
    assert abs(ours.loss - loss) < 1e-4
    assert (ours.d_image - d_image).norm() <= 1e-3 * d_image.norm() + 1e-5


def test_identical_rows_share_the_probability():
    image = unit(1, 8).expand(6, 8)
    ours = softmax_contrastive(image, image, torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(ours.loss, torch.tensor(math.log(6.0), dtype=torch.float64))


def test_correct_pairs_are_counted():
    features = torch.eye(5, dtype=torch.float64)
    ours = softmax_contrastive(features, features.roll(1, dims=0), torch.tensor(1.0, dtype=torch.float64))
    assert ours.correct_image == 0
    ours = softmax_contrastive(features, features, torch.tensor(1.0, dtype=torch.float64))
    assert ours.correct_image == 5 and ours.correct_text == 5
