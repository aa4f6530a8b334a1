"""The objective against dense float64 autograd, on one rank and on several; own terms; what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip import objectives
from dsclip.config.build import build_recipe
from dsclip.config.objective_section import HeadSection, ObjectiveSection, TermSection
from dsclip.config.schema import LossSection, ModelSection, Recipe, TrainSection
from dsclip.errors import UserError
from dsclip.losses import LossGrads, Pairs
from dsclip.objectives import TermGrads, build_objective
from dsclip.objectives.swav import codes
from tests import objective_reference as reference
from tests.test_losses import CLOSE, unit
from tests.thread_ranks import ThreadRanks

VIEWS = ("image", "text", "image_2", "text_2", "image_3")
WIDTH = 6
CLUSTERS, CLASSES = HeadSection("clusters", "prototypes", "image", 5), HeadSection("classes", "classifier", "image", 4)


def run(recipe, views, log_scale, *, ranks=1, keys=None, classes=None, in_ring=False, step=0):
    objective, n = build_objective(recipe, WIDTH), len(views["image"]) // ranks

    def one_rank(group):
        rows = slice(group.rank * n, (group.rank + 1) * n)
        mine = {name: x[rows] for name, x in views.items()}
        extra = {name: x[rows] for name, x in (("keys", keys), ("classes", classes)) if x is not None}
        pairs = Pairs(mine.pop("image"), mine.pop("text"), log_scale, **extra)
        return objective(pairs, mine, group=group, step=step)

    return ThreadRanks(ranks, in_ring).run(one_rank)


def features(n, names=VIEWS, seed=0):
    return {name: unit(n, WIDTH, seed=seed + i) for i, name in enumerate(names)}


def gradient(results, name):
    joined = lambda part: torch.cat([part(r) for r in results])  # noqa: E731
    return joined((lambda r: getattr(r, f"d_{name}")) if name in ("image", "text") else (lambda r: r.d_views[name]))


CONTRASTS = st.builds(
    TermSection, st.just("contrast"), st.permutations(VIEWS).map(lambda x: list(x[:2])), st.floats(0.1, 3),
    st.none() | st.floats(0.05, 1), st.sampled_from([None, "negative", "positive", "mask"]),
)  # fmt: skip
SWAVS = st.builds(
    TermSection, st.just("swav"), st.permutations(["image.clusters", "image_2.clusters"]), st.floats(0.1, 3),
    st.none() | st.floats(0.05, 1), epsilon=st.none() | st.floats(0.02, 1), iterations=st.none() | st.integers(1, 9),
)  # fmt: skip
OF_CLASSES = st.builds(
    TermSection, st.just("cross_entropy"), st.sampled_from([["image.classes"], ["image_3.classes"]]), st.floats(0.1, 3),
    label_smoothing=st.none() | st.floats(0, 0.9),
)  # fmt: skip
SUPERVISED = st.builds(
    TermSection, st.just("supervised_contrast"), st.lists(st.sampled_from(VIEWS), min_size=1, max_size=3, unique=True),
    st.floats(0.1, 3), st.none() | st.floats(0.05, 1), focal=st.none() | st.booleans(),
) | st.builds(
    TermSection, st.just("supervised_contrast"), st.lists(st.sampled_from(VIEWS), min_size=1, max_size=3, unique=True),
    st.floats(0.1, 3), st.none() | st.floats(0.05, 1), mixup=st.floats(0.1, 9),
    mixed=st.sampled_from([None, "both", "positive", "negative"]), focal=st.none() | st.booleans(),
)  # fmt: skip
TERMS = st.lists(CONTRASTS | SWAVS | OF_CLASSES | SUPERVISED, min_size=1, max_size=4, unique_by=lambda t: t.title)


def scores(n, seed):
    """What heads give of the views, by name: cosines and logits."""
    cosines, logits = torch.randn(4, n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).split(2)
    found = zip(("image.clusters", "image_2.clusters"), cosines.tanh(), strict=True)
    return dict(found) | dict(zip(("image.classes", "image_3.classes"), 3 * logits[..., :4], strict=True))


@settings(max_examples=60, deadline=None)
@given(TERMS, st.floats(0, 2), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_any_sum_of_terms_equals_float64_autograd(terms, pair_weight, ranks, local, in_ring, seed):
    views = features(ranks * local, seed=seed) | scores(ranks * local, seed)
    log_scale = torch.tensor(1.7, dtype=torch.float64)
    recipe = Recipe(
        objective=ObjectiveSection(pair_weight, terms, heads=[CLUSTERS, CLASSES]),
        loss=LossSection(gather="ring" if in_ring else "all"),
        train=TrainSection(seed=seed),
    )
    of_heads = {name for term in terms for name in term.between}
    used = {
        name: x for name, x in views.items() if name in {"image", "text", *recipe.objective.further_views, *of_heads}
    }
    keys, classes = torch.randint(0, 3, (2, ranks * local), generator=torch.Generator().manual_seed(seed))
    results = run(recipe, used, log_scale, ranks=ranks, in_ring=in_ring, keys=keys, classes=classes, step=7)
    leaves = {name: x.clone().requires_grad_() for name, x in used.items()}
    scale = log_scale.clone().requires_grad_()
    value = reference.objective(leaves, scale, pair_weight, terms, keys, classes, (seed, 7))
    value.backward()
    for name, leaf in leaves.items():
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(gradient(results, name), expected, **CLOSE)
    for result in results:
        torch.testing.assert_close(result.loss, value.detach(), **CLOSE)
        torch.testing.assert_close(result.d_log_scale, scale.grad, **CLOSE)
        assert list(result.values) == ["pair", *(t.title for t in terms)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_codes_have_the_marginals_of_the_global_batch(ranks):
    x = scores(12, 3)["image.clusters"]

    def found(iterations):
        each = ThreadRanks(ranks).run(lambda g: codes(x[g.rank * 12 // ranks :][: 12 // ranks], 0.2, iterations, g))
        return torch.cat(each)

    converged = found(400)
    torch.testing.assert_close(converged.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64), rtol=1e-10, atol=0)
    for q in (found(3), converged):
        torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64), rtol=1e-12, atol=0)
        scaled = (q.log() - x / 0.2)[:, :, None] - (q.log() - x / 0.2)[:, None]  # Diag(u)·exp(x/ε)·Diag(v): eq. 5
        torch.testing.assert_close(scaled, scaled[:1].expand_as(scaled), rtol=0, atol=1e-10)


def test_without_terms_the_objective_is_the_loss_bit_for_bit():
    recipe, views, log_scale = Recipe(), features(5, ("image", "text")), torch.tensor(2.0)
    (found,) = run(recipe, views, log_scale)
    objective = build_objective(recipe, WIDTH)
    plain = objective.loss(Pairs(views["image"], views["text"], log_scale))
    for name in LossGrads.__dataclass_fields__:
        one, other = getattr(found, name), getattr(plain, name)
        assert (one is None) is (other is None) and (one is None or torch.equal(one, other)), name
    assert found.values == found.d_views == {}


def test_samples_with_equal_keys_are_left_out_of_a_contrast_as_of_the_loss():
    views, log_scale, keys = (
        features(4, ("image", "text", "text_2")),
        torch.tensor(1.0).double(),
        torch.tensor([7, 8, 7, 9]),
    )
    term = TermSection("contrast", ["text", "text_2"], temperature=0.5)
    recipe = Recipe(objective=ObjectiveSection(terms=[term]), loss=LossSection(duplicates="mask"))
    (found,) = run(recipe, views, log_scale, keys=keys)
    logits = 2 * views["text"] @ views["text_2"].T
    logits[[0, 2], [2, 0]] = -torch.inf
    expected = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()).mean() / 2
    torch.testing.assert_close(found.values["contrast_text_text_2"], expected, **CLOSE)


PLUGIN = """
import torch
from dsclip.objectives import TermGrads, register_term

class Apart:
    def __init__(self, settings, negatives):
        self.names = settings.between

    def __call__(self, features, *, group):
        one, other = (features[name] for name in self.names)
        total = group.world_size * len(one)
        value = group.all_reduce_sum((one - other).square().sum()) / total
        return TermGrads(value, {self.names[0]: 2 * (one - other) / total, self.names[1]: 2 * (other - one) / total})

register_term("apart", Apart)
"""


def with_term(**keys):
    return Recipe(objective=ObjectiveSection(terms=[TermSection(**keys)]))


def test_a_term_of_a_plugin_file_joins_the_sum(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    term = TermSection("apart", ["image", "image_2"], 0.5)
    recipe = Recipe(objective=ObjectiveSection(0.0, [term], str(tmp_path / "mine.py")))
    views = features(4, ("image", "text", "image_2"))
    leaves = {name: x.clone().requires_grad_() for name, x in views.items()}
    (0.5 * (leaves["image"] - leaves["image_2"]).square().sum(1).mean()).backward()
    for ranks in (1, 2):
        results = run(recipe, views, torch.tensor(1.0).double(), ranks=ranks)
        for name in ("image", "image_2"):
            torch.testing.assert_close(gradient(results, name), leaves[name].grad, **CLOSE)
        assert not gradient(results, "text").any()


@pytest.mark.parametrize(
    "returned, message",
    [
        (1.0, "returned float; it must return dsclip.objectives.TermGrads"),
        (TermGrads(torch.zeros(()), {"text": torch.zeros(3, WIDTH)}), "gradient for text; name that feature"),
        (TermGrads(torch.zeros(()), {"image": torch.zeros(3)}), "image of shape"),
        (TermGrads(torch.zeros(()), {"image": [[0.0] * WIDTH] * 3}), "image as list; it must be a tensor of the shape"),
        (TermGrads(1.0, {}), "value as float"),
        (TermGrads(torch.zeros(1), {}), "value of shape"),
        (TermGrads(torch.zeros(()), {}, torch.zeros(2)), "d_log_scale of shape"),
    ],
)
def test_what_can_not_be_a_terms_gradients_is_refused(monkeypatch, returned, message):
    monkeypatch.setitem(objectives.registry._TERMS, "broken", lambda settings, negatives: lambda f, *, group: returned)
    with pytest.raises(UserError, match=message):
        run(with_term(name="broken", between=["image"]), features(3, ("image", "text")), torch.tensor(1.0))


def test_settings_that_no_term_can_obey_are_refused(monkeypatch):
    with pytest.raises(UserError, match="`contrst` is not registered. Did you mean `contrast`"):
        build_objective(with_term(name="contrst", between=["image", "text"]), WIDTH)
    for name, between, message in (
        ("swav", ["image.clusters"], "give two views of one head's prototypes"),
        ("swav", ["image.clusters", "image_2.others"], "give two views of one head's prototypes"),
        ("cross_entropy", ["image.classes", "image_2.classes"], "give one feature of a classifier"),
    ):
        with pytest.raises(UserError, match=message):
            build_objective(with_term(name=name, between=between), WIDTH)
    with pytest.raises(UserError, match="the batch has none"):
        run(with_term(name="cross_entropy", between=["image.classes"]), features(3) | scores(3, 0), torch.tensor(1.0))
    with pytest.raises(UserError, match="give two features"):
        build_objective(with_term(name="contrast", between=["image", "text", "text_2"]), WIDTH)
    monkeypatch.setitem(
        objectives.registry._TERMS, "two", lambda settings, negatives: dict(zip("ab", settings.between, strict=True))
    )
    with pytest.raises(UserError, match=r"`two` can't be made of \['image'\]: ValueError: zip"):
        build_objective(with_term(name="two", between=["image"]), WIDTH)
    with pytest.raises(UserError, match="registered already"):
        objectives.register_term("contrast", lambda settings, negatives: None)
    head = HeadSection("narrow", "projector", "image", WIDTH - 1)
    term = TermSection("contrast", ["image.narrow", "text"])
    with pytest.raises(UserError, match="image.narrow 5 wide and text 6 wide"):
        build_objective(Recipe(objective=ObjectiveSection(terms=[term], heads=[head])), WIDTH)
    term = TermSection("contrast", ["image", "image_2"])
    with pytest.raises(UserError, match="leave them out"):
        build_objective(Recipe(objective=ObjectiveSection(terms=[term]), loss=LossSection(name="filip")), WIDTH)
    locked = ModelSection(lock="text", lock_once=True)
    with pytest.raises(UserError, match="model.lock_once keeps one feature"):
        build_objective(Recipe(model=locked, loss=LossSection(name="filip")), WIDTH)
    for section, message in (
        ({"pair_weight": 0}, "nothing would be trained"),
        ({"plugin": "mine.py"}, "has none; name yours there"),
    ):
        with pytest.raises(UserError, match=message):
            build_recipe({"objective": section}, "mine.yaml")


GOOD = {"name": "contrast", "between": ["image", "image_2"]}


@pytest.mark.parametrize(
    "terms, message",
    [
        ([3], r"`objective.terms\[0\]` is 3; it must be \{name, between, weight, temperature, duplicates, epsilon, iterations, label_smoothing, mixup, mixed, focal\}"),
        ([{"name": "contrast"}], r"`objective.terms\[0\].between` is missing; it must be list\[str\]"),
        ([GOOD, GOOD | {"between": ["image", "img"]}], r"`objective.terms\[1\].between` is .*; give different ones of image"),
        ([GOOD | {"between": ["image", "image"]}], "give different ones"),
        ([GOOD | {"weight": "1"}], r"`objective.terms\[0\].weight` is '1'; it must be float"),
        ([GOOD | {"weight": 0}], r"`objective.terms\[0\].weight` is 0; it must be greater than 0"),
        ([GOOD | {"temperature": -0.1}], r"`objective.terms\[0\].temperature` is -0.1; it must be 0.001 or more"),
        ([GOOD | {"wieght": 1}], r"unknown key `objective.terms\[0\].wieght`. Did you mean `weight`\?"),
        ([GOOD | {"epsilon": 0.1}], "gives contrast `epsilon`; it has temperature, duplicates"),
        ([{"name": "swav", "between": ["image", "image_2"]}], "swav of image, which no head makes; it takes those of a head of `kind: prototypes`"),
        ([GOOD | {"name": "supervised_contrast", "mixed": "positive"}], "`mixed: positive` without `mixup`"),
        ([{"name": "supervised_contrast", "between": ["image"]}], "nothing says which those are; set `data.group_key` or `data.templates`"),
        ([GOOD | {"mixup": 1.0}], "gives contrast `mixup`; it has temperature, duplicates"),
        ([GOOD, GOOD | {"weight": 0.5}], "has contrast_image_image_2 twice"),
    ],
)  # fmt: skip
def test_a_wrong_term_is_said_at_its_field(terms, message):
    with pytest.raises(UserError, match=message):
        build_recipe({"objective": {"terms": terms}}, "mine.yaml")


@pytest.mark.parametrize(
    "views, message",
    [
        ([{"name": "image"}], "image_2, text_2"),
        ([{"name": "image_3"}], "image_3, which no term compares"),
        ([{"name": "image_2"}, {"name": "image_2", "flip": True}], "one view twice"),
        ([{"name": "image_2", "word_repetition": 0.3}], "gives image_2 `word_repetition`; images have crop_scale"),
        ([{"name": "text_2", "word_repetition": 0}], r"`objective.views\[0\].word_repetition` is 0; it must be"),
        ([{"name": "image_2", "crop_scale": [0.5, 0.1]}], r"`objective.views\[0\].crop_scale` is \[0.5, 0.1\]"),
    ],
)  # fmt: skip
def test_a_wrong_view_is_said_at_its_field(views, message):
    with pytest.raises(UserError, match=message):
        build_recipe(
            {"objective": {"terms": [GOOD, GOOD | {"between": ["text", "text_2"]}], "views": views}}, "mine.yaml"
        )


def test_the_same_features_at_two_temperatures_are_two_terms():
    terms = [GOOD | {"temperature": 0.1}, GOOD | {"temperature": 0.5}, GOOD]
    recipe = build_recipe({"objective": {"terms": terms}}, "mine.yaml")
    (found,) = run(recipe, features(4, ("image", "text", "image_2")), torch.tensor(1.0).double())
    title = "contrast_image_image_2"
    assert list(found.values) == ["pair", title, f"{title}.2", f"{title}.3"]
    assert len({value.item() for value in found.values.values()}) == 4
