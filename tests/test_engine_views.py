"""Further views in the engine: what a queue doesn't hold isn't encoded for it, and what isn't finite has a name."""

from dataclasses import replace

import pytest
import torch

from dsclip.config.objective_section import HeadSection, ObjectiveSection, TermSection
from dsclip.config.schema import BatchSection, LossSection, Recipe
from dsclip.distributed import Collectives
from dsclip.engine.finite import skip_reason
from dsclip.engine.loss_inputs import LossInputs
from dsclip.engine.loss_scalars import LossScalars
from dsclip.engine.micro_batch import MicroBatcher
from dsclip.errors import UserError
from dsclip.losses import Pairs
from dsclip.objectives import build_objective
from tests.distributed.exactness_worker import GLOBAL_BATCH
from tests.distributed.negatives_worker import SHALLOW, captions, whole_batch

TERMS = [TermSection("contrast", ["image", "image_2"]), TermSection("contrast", ["text", "text_2"])]


def test_a_momentum_encoder_is_given_the_pairs_alone():
    batch = replace(whole_batch(), views={"image_2": whole_batch().images.flip(3), "text_2": captions(GLOBAL_BATCH, 5)})
    recipe = Recipe(
        batch=BatchSection(GLOBAL_BATCH), loss=LossSection(hard_negatives="own"), objective=ObjectiveSection(1.0, TERMS)
    )
    batcher = MicroBatcher(recipe, SHALLOW, torch.device("cpu"), 0, 1)
    (everything,), (pairs,) = batcher.split(batch, 0), batcher.of_pairs_alone().split(batch, 0)
    n, hard = GLOBAL_BATCH, len(batch.hard_owner)
    rows = lambda m: (len(m.images), len(m.captions.in_order(m.captions.ends)))  # noqa: E731
    assert rows(everything) == (2 * n, 2 * n + hard) and rows(pairs) == (n, n)
    assert torch.equal(pairs.images, batch.images)
    ends = everything.split_texts(everything.captions.in_order(everything.captions.ends))
    assert torch.equal(pairs.captions.in_order(pairs.captions.ends), ends["text"])


@pytest.mark.parametrize("name, reason", [("image_2", "features"), ("text", "features"), ("loss", "loss")])
def test_a_skipped_step_names_features_for_any_view_that_is_not_finite(name, reason):
    views = {
        view: torch.nn.functional.normalize(torch.randn(3, 4), dim=1) for view in ("image", "text", "image_2", "text_2")
    }
    if name in views:
        views[name][1, 2] = torch.nan
    objective = build_objective(Recipe(objective=ObjectiveSection(1.0, TERMS)), 4)
    further = {view: views[view] for view in ("image_2", "text_2")}
    group = Collectives(0, 1)
    grads = objective(Pairs(views["image"], views["text"], torch.tensor(1.0)), further, group=group)
    if name == "loss":
        grads = replace(grads, loss=grads.loss + torch.nan)
    assert skip_reason(views.values(), grads, group) == f"{reason} on 1 of 1 ranks"


@pytest.mark.parametrize(
    "classes, message",
    [
        (None, "the objective of the recipe needs batch.classes, which is missing"),
        ([0, 1] * 5 + [0, 2], "batch.classes has 0 to 2; the classifier's are 0 to 1"),
        ([0, 1] * 5 + [0, -1], "batch.classes has -1 to 1"),
    ],
)  # fmt: skip
def test_classes_that_a_classifier_can_not_have_are_refused(classes, message):
    head = HeadSection("classes", "classifier", "image", 2)
    term = TermSection("cross_entropy", ["image.classes"])
    recipe = Recipe(batch=BatchSection(GLOBAL_BATCH), objective=ObjectiveSection(1.0, [term], heads=[head]))
    batcher = MicroBatcher(recipe, SHALLOW, torch.device("cpu"), 0, 1)
    batch = replace(whole_batch(), classes=None if classes is None else torch.tensor(classes))
    features = [(torch.zeros(GLOBAL_BATCH, SHALLOW.embed_dim + 2), torch.zeros(GLOBAL_BATCH, SHALLOW.embed_dim))]
    scalars = LossScalars(recipe.loss, recipe.optim, 1, torch.device("cpu"), has_bias=False)
    inputs = LossInputs(recipe.loss, batcher, SHALLOW.context_length, False)
    with pytest.raises(UserError, match=message):
        inputs(batcher.split(batch, 0), features, batch, scalars, None, 0)
