"""Every loss × every negatives option against the dense float64 references, on 1, 2 and 4 ranks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip import losses
from dsclip.errors import UserError
from dsclip.losses import LossGrads, Negatives, Pairs
from tests import loss_reference as reference
from tests.thread_ranks import ThreadRanks

CLOSE = dict(rtol=1e-9, atol=1e-11)
LOSSES = ("softmax", "sigmoid", "filip")


def takes(name, options: Negatives) -> bool:
    """Whether a loss obeys these options; others are refused."""
    return name == "softmax" or not options.debiased


OPTIONS = {
    "plain": Negatives(),
    "smoothing": Negatives(label_smoothing=0.1),
    "positive duplicates": Negatives(duplicates="positive"),
    "masked duplicates": Negatives(duplicates="mask"),
    "filter": Negatives(filter_margin=0.1),
    "strict filter": Negatives(filter_margin=-0.2),
    "reweighting": Negatives(beta=0.5),
    "own hard negatives": Negatives(hard="own"),
    "everything": Negatives("positive", "own", 0.05, 0.3, 0.1),
    "everything, masked": Negatives("mask", "global", 0.05, 0.3, 0.1),
    "debiased": Negatives(debiased=0.1),
    "debiased to the floor": Negatives(debiased=0.9),
    "debiased, reweighted, masked": Negatives("mask", "own", beta=0.5, debiased=0.1),
    "debiased everything": Negatives("positive", "global", 0.05, 0.3, 0.1, debiased=0.2),
}


OBEYED = [(name, option) for name in LOSSES for option, negatives in OPTIONS.items() if takes(name, negatives)]


def unit(*shape, seed, dtype=torch.float64):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


class Case:
    """A global batch with hard negatives, duplicates and a queue, whole and cut into ranks."""

    def __init__(self, name, world_size, local, *, width=6, scale=10.0, seed=0, extras=True, dtype=torch.float64):
        self.name, self.world_size, self.local = name, world_size, local
        total, tokens = world_size * local, name == "filip"
        generator = torch.Generator().manual_seed(seed)
        self.image = unit(total, *((4,) if tokens else ()), width, seed=seed, dtype=dtype)
        self.text = unit(total, *((5,) if tokens else ()), width, seed=seed + 1, dtype=dtype)
        self.log_scale = torch.tensor(math.log(scale), dtype=dtype)
        self.bias = torch.tensor(-2.0, dtype=dtype) if name == "sigmoid" else None
        self.image_valid = torch.ones(total, 4, dtype=torch.bool) if tokens else None
        self.text_valid = self._lengths(total, generator) if tokens else None
        self.keys = self.hard = self.hard_owner = self.hard_valid = self.queue = self.queue_valid = None
        self.hard_counts = torch.zeros(total, dtype=torch.int64)
        if extras:
            self.keys = torch.randint(0, max(2, total // 2), (total,), generator=generator)
            self.hard_counts = torch.randint(0, 3, (total,), generator=generator)
            self.hard_owner = torch.repeat_interleave(torch.arange(total), self.hard_counts)
            self.hard = unit(len(self.hard_owner), *self.text.shape[1:], seed=seed + 2, dtype=dtype)
            self.hard_valid = self._lengths(len(self.hard), generator) if tokens else None
            queue_keys = torch.randint(0, max(2, total // 2), (3,), generator=generator)
            self.queue = (unit(3, *self.image.shape[1:], seed=seed + 3, dtype=dtype),
                          unit(3, *self.text.shape[1:], seed=seed + 4, dtype=dtype), queue_keys)  # fmt: skip
            self.queue_valid = self._lengths(3, generator) if tokens else None

    @staticmethod
    def _lengths(count, generator):
        lengths = torch.randint(1, 6, (count,), generator=generator)
        return torch.arange(5)[None] < lengths[:, None]

    def pairs(self, rank) -> Pairs:
        mine = slice(rank * self.local, (rank + 1) * self.local)
        cut = lambda x: None if x is None else x[mine]  # noqa: E731
        extra = {}
        if self.hard is not None:
            chosen = (self.hard_owner >= mine.start) & (self.hard_owner < mine.stop)
            extra = {"hard_text": self.hard[chosen], "hard_owner": self.hard_owner[chosen] - mine.start}
            if self.hard_valid is not None:
                extra["hard_valid"] = self.hard_valid[chosen]
            extra |= dict(zip(("queue_image", "queue_text", "queue_keys"), self.queue, strict=True))
            extra["queue_text_valid"] = self.queue_valid
        return Pairs(
            self.image[mine], self.text[mine], self.log_scale, self.bias, cut(self.image_valid), cut(self.text_valid),
            cut(self.keys), **extra,
        )  # fmt: skip

    def ours(self, options, tile_entries, *, in_ring=False) -> list[LossGrads]:
        loss = losses.find_loss(self.name)

        def one_rank(group):
            return loss(self.pairs(group.rank), negatives=options, group=group, tile_entries=tile_entries)

        return ThreadRanks(self.world_size, in_ring).run(one_rank)

    def reference(self, options):
        leaves = {
            "image": self.image,
            "text": self.text,
            "log_scale": self.log_scale,
            "bias": self.bias,
            "hard": self.hard,
        }
        leaves = {k: v.double().clone().requires_grad_() for k, v in leaves.items() if v is not None}
        queue = None if self.queue is None else (*(q.double() for q in self.queue[:2]), self.queue[2])
        similar = reference.cosine
        if self.name == "filip":

            def valid(x):
                known = {id(leaves["text"]): self.text_valid, id(leaves.get("hard")): self.hard_valid}
                known |= {} if queue is None else {id(queue[1]): self.queue_valid}
                return known.get(id(x), torch.ones(x.shape[:2], dtype=torch.bool))

            def similar(x, y):
                return reference.late_interaction(x, y, valid(x), valid(y))

        value = reference.loss(
            self.name, leaves["image"], leaves["text"], leaves["log_scale"], leaves.get("bias"), options, similar,
            self.keys, leaves.get("hard"), self.hard_owner, queue,
        )  # fmt: skip
        value.backward()
        zero = torch.zeros((), dtype=torch.float64)
        return value.detach(), {k: (zero if v.grad is None else v.grad) for k, v in leaves.items()}

    def check(self, options, tile_entries=None, close=CLOSE, *, in_ring=False):
        results = self.ours(options, tile_entries, in_ring=in_ring)
        value, grads = self.reference(options)
        for result in results:
            torch.testing.assert_close(result.loss.double(), value, **close)
            torch.testing.assert_close(result.d_log_scale.double(), grads["log_scale"], **close)
            if self.name == "sigmoid":
                torch.testing.assert_close(result.d_bias.double(), grads["bias"], **close)
        for field, key in (("d_image", "image"), ("d_text", "text"), ("d_hard_text", "hard")):
            if key in grads:
                ours = torch.cat([getattr(r, field) for r in results]).double()
                torch.testing.assert_close(ours, grads[key].expand_as(ours), **close)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("name", "option"), OBEYED)
def test_every_loss_with_every_option_equals_its_reference(name, option, world_size):
    Case(name, world_size, 8 // world_size).check(OPTIONS[option], tile_entries=12)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(LOSSES), world_size=st.sampled_from([1, 2, 4]), local=st.integers(1, 7),
    width=st.integers(2, 9), tile_entries=st.integers(1, 400), scale=st.floats(1, 60), seed=st.integers(0, 999),
    extras=st.booleans(), duplicates=st.sampled_from(["negative", "positive", "mask"]),
    hard=st.sampled_from(["global", "own"]), margin=st.sampled_from([None, -0.3, 0.2]), beta=st.sampled_from([0, 0.4]),
    smoothing=st.sampled_from([0, 0.2]), debiased=st.sampled_from([0, 0.05, 0.7]),
)  # fmt: skip
def test_any_shape_tile_and_temperature(
    name,
    world_size,
    local,
    width,
    tile_entries,
    scale,
    seed,
    extras,
    duplicates,
    hard,
    margin,
    beta,
    smoothing,
    debiased,
):
    case = Case(name, world_size, local, width=width, scale=scale, seed=seed, extras=extras)
    # torch's softplus is linear beyond 20, which leaves out up to e^-20 = 2e-9 an entry.
    options = Negatives(duplicates, hard, margin, beta, smoothing, debiased if name == "softmax" else 0)
    case.check(options, tile_entries, dict(rtol=1e-7, atol=1e-8))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("name", "option"), OBEYED)
def test_float32_is_within_1e_5(name, option, world_size):
    case = Case(name, world_size, 8 // world_size, dtype=torch.float32)
    results, (value, grads) = case.ours(OPTIONS[option], 12), case.reference(OPTIONS[option])
    assert abs(results[0].loss - value) <= 1e-5 * abs(value)
    for field, key in (("d_image", "image"), ("d_text", "text"), ("d_hard_text", "hard")):
        ours = torch.cat([getattr(r, field) for r in results]).double()
        assert (ours - grads[key]).norm() <= 1e-5 * grads[key].norm()


@pytest.mark.parametrize("name", LOSSES)
def test_options_that_do_nothing_are_plain_bit_for_bit(name):
    plain = Case(name, 2, 5, extras=False, dtype=torch.float32)
    idle = Case(name, 2, 5, extras=False, dtype=torch.float32)
    shape = idle.text.shape[1:]
    idle.keys = torch.arange(10)
    idle.hard, idle.hard_owner = torch.zeros(0, *shape), torch.zeros(0, dtype=torch.int64)
    idle.hard_valid = torch.zeros(0, 5, dtype=torch.bool) if name == "filip" else None
    idle.queue = (torch.zeros(0, *idle.image.shape[1:]), torch.zeros(0, *shape), torch.zeros(0, dtype=torch.int64))
    expected = plain.ours(Negatives(), 12)
    for ours, theirs in zip(idle.ours(Negatives(beta=0.0), 12), expected, strict=True):
        for field in ("loss", "d_image", "d_text", "d_log_scale", "correct_image", "correct_text"):
            assert torch.equal(getattr(ours, field), getattr(theirs, field)), field


@pytest.mark.parametrize("scale", [100.0, 1000.0])
def test_float32_stays_finite_and_close_at_large_scales(scale):
    case = Case("softmax", 1, 64, width=16, scale=scale, extras=False, dtype=torch.float32)
    case.text = case.image
    (ours,), (value, grads) = case.ours(Negatives(), 500), case.reference(Negatives())
    assert abs(ours.loss - value) < 1e-4
    assert (ours.d_image - grads["image"]).norm() <= 1e-3 * grads["image"].norm() + 1e-5


def test_a_false_negative_far_above_the_rest_hides_nothing():
    # Its own pair is bad and the excluded entry is 200 nats above all others: exp(-200) is zero in float32.
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    pairs = Pairs(image, -image, torch.tensor(math.log(100.0)))
    ours = losses.softmax(pairs, negatives=Negatives(filter_margin=0.0))
    assert torch.equal(ours.loss, torch.tensor(0.0)) and ours.masked == 4


def test_a_process_on_its_own_is_the_only_rank():
    features, alone = torch.ones(3, 2), losses.SingleRank()
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.all_gather(features) is features and alone.all_reduce_sum(features) is features


def test_identical_rows_share_the_probability():
    image = unit(1, 8, seed=0).expand(6, 8)
    ours = losses.softmax(Pairs(image, image, torch.tensor(3.0, dtype=torch.float64)))
    torch.testing.assert_close(ours.loss, torch.tensor(math.log(6.0), dtype=torch.float64))


def test_correct_pairs_and_masked_entries_are_counted():
    eye, log_scale = torch.eye(5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    assert losses.softmax(Pairs(eye, eye.roll(1, dims=0), log_scale)).correct_image == 0
    ours = losses.softmax(Pairs(eye, eye, log_scale))
    assert (ours.correct_image, ours.correct_text, ours.masked) == (5, 5, 0)
    keys = torch.tensor([7, 7, 7, 1, 2])
    ours = losses.softmax(Pairs(eye, eye, log_scale, keys=keys), negatives=Negatives(duplicates="mask"))
    assert ours.masked == 2 * 6  # three equal keys: six ordered pairs, in both directions


def test_an_entry_as_similar_as_the_pair_itself_stays_at_a_margin_of_0():
    ones = torch.ones(4, 1, dtype=torch.float64)
    pairs = Pairs(ones, ones, torch.tensor(1.0, dtype=torch.float64))
    assert losses.softmax(pairs, negatives=Negatives(filter_margin=0.0)).masked == 0
    assert losses.softmax(pairs, negatives=Negatives(filter_margin=1e-9)).masked == 2 * 12


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_accuracy_is_that_of_the_dense_matrix(name, world_size):
    case = Case(name, world_size, 64 // world_size, width=8, extras=False, dtype=torch.float32)
    if name != "filip":
        case.text = torch.nn.functional.normalize(case.image + 0.9 * case.text, dim=-1)
    similarity = case.image @ case.text.T if name != "filip" else None
    if name == "filip":
        everything = torch.ones(64, 4, dtype=torch.bool)
        similarity = reference.late_interaction(case.image, case.text, everything, case.text_valid)
    results = case.ours(Negatives(), 70)
    expected = (similarity.argmax(1) == torch.arange(64)).sum()
    assert sum(r.correct_image for r in results) == expected
    assert name == "filip" or 20 < expected < 64


def test_features_in_half_precision_travel_so_and_are_computed_in_float32():
    case = Case("softmax", 2, 5, extras=False, dtype=torch.float32)
    rounded = Case("softmax", 2, 5, extras=False, dtype=torch.float32)
    rounded.image, rounded.text = case.image.bfloat16(), case.text.bfloat16()
    case.image, case.text = rounded.image.float(), rounded.text.float()
    for ours, theirs in zip(rounded.ours(Negatives(), 12), case.ours(Negatives(), 12), strict=True):
        assert ours.d_image.dtype == torch.float32
        assert torch.equal(ours.d_image, theirs.d_image) and torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize(
    "wrong", [{"duplicates": "both"}, {"hard": "all"}, {"label_smoothing": 1.0}, {"beta": -1.0}, {"debiased": 1.0}]
)
def test_impossible_options_are_refused(wrong):
    with pytest.raises(UserError):
        Negatives(**wrong)
