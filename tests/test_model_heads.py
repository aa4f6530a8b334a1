"""Named heads: what each computes, in float64; what is trained, and what names they may have."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsclip.bench.step import make_batch
from dsclip.config.build import build_recipe
from dsclip.config.objective_section import HeadSection, ObjectiveSection, TermSection
from dsclip.config.schema import ModelSection
from dsclip.engine.head_columns import HeadColumns
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.model.heads import add_heads
from dsclip.model.trained import choose_trained, trained_part
from dsclip.optim.groups import check_rules, grouped_names
from tests.distributed.exactness_worker import OPTIM, OTHER_TOWERS

DEMO = resolve_preset("demo", vision_layers=1, text_layers=1)
HEADS = (
    HeadSection("clusters", "prototypes", "projector", 7),
    HeadSection("projector", "projector", "image", 5, 11),
    HeadSection("words", "projector", "text", 6),
    HeadSection("classes", "classifier", "image", 3),
    HeadSection("kinds", "prototypes", "image", 4),
)
OBJECTIVE = ObjectiveSection(heads=list(HEADS))


def model(config=DEMO):
    torch.manual_seed(0)
    clip = Clip(config)
    add_heads(clip, OBJECTIVE)
    return clip.double()


@pytest.mark.parametrize("tower", ["class", *OTHER_TOWERS])
def test_heads_give_what_their_formulas_say_of_what_the_tower_pools(tower):
    config = DEMO if tower == "class" else OTHER_TOWERS[tower]
    clip, batch = model(config), make_batch(config, 3, 1)
    pooled = {}
    for name in ("visual", "text"):
        projection = getattr(clip, name).head.projection
        projection.register_forward_pre_hook(lambda _, inputs, name=name: pooled.update({name: inputs[0]}))
    image, text = clip(batch.images, batch.tokens, with_named=True)
    plain_image, plain_text = clip(batch.images, batch.tokens)
    weights, x = clip.visual.head.named, pooled["visual"]
    unit = lambda rows: rows / rows.square().sum(-1, keepdim=True).sqrt()  # noqa: E731
    linear = lambda layer, rows: rows @ layer.weight.T + layer.bias  # noqa: E731
    projected = unit(linear(weights["projector"].output, F.gelu(linear(weights["projector"].hidden, x))))
    expected = {
        "image": plain_image,
        "image.clusters": projected @ unit(weights["clusters"].weight).T,
        "image.projector": projected,
        "image.classes": linear(weights["classes"].output, x),
        "image.kinds": unit(x) @ unit(weights["kinds"].weight).T,
    }
    found = HeadColumns.of(OBJECTIVE, config.embed_dim).split({"image": image, "text": text})
    words = clip.text.head.named["words"]
    expected["text"] = plain_text
    expected["text.words"] = unit(linear(words.output, F.gelu(linear(words.hidden, pooled["text"]))))
    assert list(found) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-12, atol=1e-12)
    assert words.hidden.out_features == config.text_width  # as wide as its tower where nothing else is said


def test_what_heads_give_is_float32_in_a_bf16_model():
    clip, batch = model().bfloat16(), make_batch(DEMO, 3, 1)
    image, text = clip(batch.images, batch.tokens, with_named=True)
    assert image.dtype == text.dtype == torch.float32
    columns = HeadColumns.of(OBJECTIVE, DEMO.embed_dim)
    sent = {name: x.dtype == torch.bfloat16 for name, x in columns.narrowed(columns.split({"image": image})).items()}
    assert sent == {
        "image": True, "image.clusters": False, "image.projector": True, "image.classes": False, "image.kinds": False,
    }  # fmt: skip


def test_without_heads_a_model_is_what_it_was():
    torch.manual_seed(0)
    plain = Clip(DEMO)
    after = torch.rand(1)
    torch.manual_seed(0)
    again = Clip(DEMO)
    choose_trained(again, ModelSection(), ObjectiveSection())
    assert torch.equal(torch.rand(1), after)
    ours, theirs = plain.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    torch.manual_seed(0)
    choose_trained(headed := Clip(DEMO), ModelSection(), OBJECTIVE)
    assert all(torch.equal(ours[n], headed.state_dict()[n]) for n in ours)  # heads are drawn after the towers


@pytest.mark.parametrize("section", [{"lock": "image"}, {"lora_rank": 4, "lora_targets": ["text.blocks"]}])
def test_heads_of_a_locked_tower_are_trained(section):
    clip = Clip(DEMO)
    choose_trained(clip, ModelSection(**section), OBJECTIVE)
    trained = {name for name, p in clip.named_parameters() if p.requires_grad and name.startswith("visual")}
    assert trained == {name for name, _ in clip.named_parameters() if "visual.head.named" in name}
    assert clip.visual.locked == len(clip.visual.layers()) - 1
    part = trained_part(DEMO, ModelSection(**section), OBJECTIVE)
    alone = trained_part(DEMO, ModelSection(**section))
    of_heads = sum(p.numel() for name, p in clip.named_parameters() if ".named." in name)
    assert part.parameters - alone.parameters == part.beside - alone.beside == of_heads


def test_heads_decay_as_matrices_do_and_rules_find_them():
    optim = replace(OPTIM, rules=[{"match": r"named\.classes", "lr_scale": 10}])
    check_rules(DEMO, ModelSection(), optim, OBJECTIVE)
    with pytest.raises(UserError, match="matches no parameter"):
        check_rules(DEMO, ModelSection(), optim)
    groups = {name: group for group, names in grouped_names(model(), optim).items() for name in names}
    assert groups["visual.head.named.classes.output.weight"].lr_scale == 10
    assert groups["visual.head.named.kinds.weight"].weight_decay == optim.weight_decay
    assert groups["visual.head.named.projector.output.bias"].weight_decay == 0


def test_a_name_that_torch_has_taken_is_refused():
    with pytest.raises(UserError, match="have a `keys` of their own; rename the head"):
        add_heads(Clip(DEMO), ObjectiveSection(heads=[HeadSection("keys", "projector", "image", 4)]))


GOOD = {"name": "projector", "kind": "projector", "of": "image", "width": 8}
TERM = {"name": "contrast", "between": ["image.projector", "image_2.projector"]}


@pytest.mark.parametrize(
    "heads, terms, message",
    [
        ([GOOD, GOOD], [TERM], "one name twice"),
        ([GOOD | {"name": "image"}], [TERM], "give small letters, digits and _, a letter first, and neither image nor text"),
        ([GOOD | {"of": "imgae"}], [TERM], "projector is `of: imgae`; a projector is of image or text"),
        ([GOOD, {"name": "c", "kind": "prototypes", "of": "projetor", "width": 3}], [TERM], "is of image or text or projector"),
        ([GOOD | {"kind": "prototypes", "hidden": 3}], [TERM], "has `hidden: 3`, which belongs to a projector"),
        ([GOOD | {"width": 0}], [TERM], r"`objective.heads\[0\].width` is 0; it must be greater than 0"),
        ([GOOD | {"kind": "mlp"}], [TERM], r"`objective.heads\[0\].kind` is `mlp`. Choose from: projector, prototypes, classifier"),
        ([GOOD, GOOD | {"name": "other"}], [TERM], "has other, which no term takes features from"),
        ([], [TERM], "compares image.projector, and `objective.heads` has no projector; known: there are none"),
        ([GOOD], [TERM | {"between": ["image.projector", "text.projector"]}], "the head projector is of the image tower"),
        ([GOOD], [TERM | {"between": ["image.projector", "image.Projector"]}], "or of a head: image.NAME"),
        ([GOOD | {"kind": "classifier"}], [TERM], "contrast of image.projector, which classifier makes; it takes a view itself or those"),
    ],
)  # fmt: skip
def test_a_wrong_head_is_said_at_its_field(heads, terms, message):
    with pytest.raises(UserError, match=message):
        build_recipe({"objective": {"terms": terms, "heads": heads}}, "mine.yaml")


@pytest.mark.parametrize(
    "others, message",
    [
        ({"model": {"lock": "image", "lock_once": True, "init": "x"}, "data": {"crop_scale": [1.0, 1.0]}}, "a head of it in"),
        ({"loss": {"queue_size": 8, "queue_momentum": 0.9}}, "have no moving average"),
    ],
)  # fmt: skip
def test_what_a_head_does_not_go_with_is_refused(others, message):
    term = TERM | {"between": ["image.projector", "text.words"]}
    words = {"name": "words", "kind": "projector", "of": "text", "width": 8}
    with pytest.raises(UserError, match=message):
        build_recipe({"objective": {"terms": [term], "heads": [GOOD, words]}, **others}, "mine.yaml")


def test_views_behind_heads_are_made():
    recipe = build_recipe({"objective": {"terms": [TERM], "heads": [GOOD]}}, "mine.yaml")
    assert recipe.objective.further_views == ("image_2",)
    assert recipe.objective.titles == ["contrast_image.projector_image_2.projector"]
    assert TermSection("contrast", ["text_2.words", "text"]).title == "contrast_text_2.words_text"
