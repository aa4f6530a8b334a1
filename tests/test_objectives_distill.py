"""Distillation against dense float64 autograd, on one rank and on several; what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.config.build import build_recipe
from dsclip.config.objective_section import HeadSection, ObjectiveSection, TermSection
from dsclip.config.schema import Recipe
from dsclip.errors import UserError
from dsclip.losses import Negatives, Pairs
from dsclip.losses.group import ALONE
from dsclip.objectives import Features, TeacherFeatures, build_objective
from dsclip.objectives.distill import Distill, check_widths, distill, distill_features
from tests import objective_reference as reference
from tests.test_losses import CLOSE, unit
from tests.thread_ranks import ThreadRanks

NAMES = ("image", "text")
TEMPERATURE = 0.2  # of the teacher


def case(n, width, teacher_width, seed):
    """Unit features of student and teacher, [n, width] each, by name."""
    student = {name: unit(n, width, seed=seed + i) for i, name in enumerate(NAMES)}
    return student, {name: unit(n, teacher_width, seed=seed + 7 + i) for i, name in enumerate(NAMES)}


@settings(max_examples=50, deadline=None)
@given(
    st.permutations(NAMES), st.none() | st.floats(0.05, 1), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40),
    st.integers(2, 9), st.integers(0, 99),
)  # fmt: skip
def test_distilled_similarities_equal_float64_autograd(names, temperature, ranks, local, entries, teacher_width, seed):
    student, teacher = case(ranks * local, 6, teacher_width, seed)
    log_scale = torch.tensor(1.3, dtype=torch.float64)
    term = Distill(tuple(names), temperature, entries)

    def one_rank(group):
        mine = [
            {k: x[group.rank * local : (group.rank + 1) * local] for k, x in of.items()} for of in (student, teacher)
        ]
        taught = TeacherFeatures(mine[1], -math.log(TEMPERATURE))
        return term(Features(mine[0], log_scale, teacher=taught), group=group)

    results = ThreadRanks(ranks).run(one_rank)
    leaves = {name: x.clone().requires_grad_() for name, x in student.items()}
    scale = log_scale.clone().requires_grad_()
    factor = scale.exp() if temperature is None else 1 / temperature
    value = reference.distill(*(leaves[n] for n in names), factor, *(teacher[n] for n in names), 1 / TEMPERATURE)
    value.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(torch.cat([r.d_views[name] for r in results]), leaf.grad, **CLOSE)
    for result in results:
        torch.testing.assert_close(result.value, value.detach(), **CLOSE)
        if temperature is None:
            torch.testing.assert_close(result.d_log_scale, scale.grad, **CLOSE)
        else:
            assert result.d_log_scale is None


@pytest.mark.parametrize("between", [["image"], ["text"], ["image", "text"]])
def test_both_terms_in_an_objective_equal_float64_autograd_on_every_number_of_ranks(between):
    student, teacher = case(6, 5, 5, seed=1)
    terms = [TermSection("distill", ["image", "text"], 0.7), TermSection("distill_features", between, 1.5)]
    objective = build_objective(
        Recipe(objective=ObjectiveSection(0.5, terms, teacher="x", teacher_temperature=TEMPERATURE)), 5
    )
    leaves = {name: x.clone().requires_grad_() for name, x in student.items()}
    scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    value = reference.objective(leaves, scale, 0.5, [])
    value = value + 0.7 * reference.distill(*leaves.values(), scale.exp(), *teacher.values(), 1 / TEMPERATURE)
    value = value + 1.5 * reference.distill_features([(leaves[name], teacher[name]) for name in between])
    value.backward()
    for ranks in (1, 2, 3):

        def one_rank(group, n=6 // ranks):
            mine = [{k: x[group.rank * n : (group.rank + 1) * n] for k, x in of.items()} for of in (student, teacher)]
            pairs = Pairs(mine[0]["image"], mine[0]["text"], scale.detach())
            return objective(pairs, {}, group=group, teacher=mine[1])

        results = ThreadRanks(ranks).run(one_rank)
        for name, leaf in leaves.items():
            torch.testing.assert_close(torch.cat([getattr(r, f"d_{name}") for r in results]), leaf.grad, **CLOSE)
        for result in results:
            torch.testing.assert_close(result.loss, value.detach(), **CLOSE)
            torch.testing.assert_close(result.d_log_scale, scale.grad, **CLOSE)


def test_a_student_that_is_its_teacher_learns_nothing():
    student, _ = case(5, 6, 6, seed=3)
    taught = TeacherFeatures(student, 1.3)
    for term in (Distill(NAMES, None), distill_features(TermSection("distill_features", list(NAMES)), Negatives())):
        found = term(Features(student, torch.tensor(1.3, dtype=torch.float64), teacher=taught), group=ALONE)
        assert abs(found.value) < 1e-12 and all(grad.abs().max() < 1e-12 for grad in found.d_views.values())


def test_what_can_not_be_distilled_is_refused():
    student, teacher = case(4, 6, 3, seed=0)
    features = Features(student, torch.tensor(1.0).double(), teacher=TeacherFeatures(teacher, 1.0))
    with pytest.raises(
        UserError, match="the 6 numbers of image with the teacher's 3; give a head of kind: projector with width: 3"
    ):
        distill_features(TermSection("distill_features", ["image"]), Negatives())(features, group=ALONE)
    with pytest.raises(UserError, match=r"set objective\.teacher"):
        Distill(NAMES, None)(Features(student, torch.tensor(1.0)), group=ALONE)
    tall = TermSection("distill_features", ["image", "text.tall"])
    tall = ObjectiveSection(terms=[tall], heads=[HeadSection("tall", "projector", "text", 9)], teacher="x")
    check_widths(tall, 9, 9)
    for own, teacher_width, said in ((6, 9, "6 numbers of image with"), (7, 7, "9 numbers of text.tall with")):
        with pytest.raises(UserError, match=said):
            check_widths(tall, own, teacher_width)
    for make, between, said in (
        (distill, ["image"], r"give between: \[image, text\]"),
        (distill_features, ["image", "image_2"], "none of image_2"),
    ):
        with pytest.raises(UserError, match=said):
            make(TermSection(make.__name__, between), Negatives())


@pytest.mark.parametrize(
    "objective, said",
    [
        ({"terms": [{"name": "distill", "between": ["image", "text"]}]}, "`objective.teacher` is not set"),
        (
            {"terms": [{"name": "distill", "between": ["image", "text"], "duplicates": "mask"}], "teacher": "x"},
            "gives distill `duplicates`",
        ),
        (
            {"terms": [{"name": "distill_features", "between": ["image"], "temperature": 0.1}], "teacher": "x"},
            "gives distill_features `temp",
        ),
        (
            {"terms": [{"name": "distil", "between": ["image", "text"]}], "teacher": "x"},
            "has `distil`, which does not distil. Did you mean `distill`",
        ),
        (
            {"terms": [{"name": "distill", "between": ["image", "text"]}], "teacher": ""},
            "`objective.teacher` is empty; name a model's folder there",
        ),
        ({"teacher": "runs/big"}, "no term of `objective.terms` distils"),
        ({"teacher_temperature": 0.1}, "no term of `objective.terms` distils"),
    ],
)
def test_a_recipe_has_a_teacher_and_a_term_that_distils_or_neither_and_no_key_that_says_nothing(objective, said):
    with pytest.raises(UserError, match=said):
        build_recipe({"objective": objective}, "recipe")
