"""Parameter groups: every name with exactly the factor and the decay that rules and layer-wise decay give it."""

import pytest
import torch

from dsclip.config.schema import ModelSection, OptimSection
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.optim.groups import check_rules, grouped_names, parameter_groups, set_learning_rate

MODEL = Clip(resolve_preset("demo", vision_layers=2, text_layers=1, vision_registers=1, vision_pool="attention"))
NAMES = [name for name, _ in MODEL.named_parameters()]
VECTORS = {n for n, p in MODEL.named_parameters() if p.ndim < 2 or n.endswith(("position_embedding", "registers"))}
VECTORS |= {"visual.head.pool.query_embedding"}


def values(**optim):
    """{name: (factor, decay)}"""
    groups = grouped_names(MODEL, OptimSection(weight_decay=0.1, **optim))
    found = {name: (g.lr_scale, g.weight_decay) for g, names in groups.items() for name in names}
    assert sorted(found) == sorted(NAMES) == sorted(n for names in groups.values() for n in names), "each exactly once"
    return found


def test_without_rules_there_are_two_groups_matrices_and_the_rest():
    groups = parameter_groups(MODEL, OptimSection(weight_decay=0.1))
    names = {id(p): name for name, p in MODEL.named_parameters()}
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.1, 1.0), (0.0, 1.0)]
    assert {names[id(p)] for p in groups[1]["params"]} == VECTORS
    assert {names[id(p)] for p in groups[0]["params"]} == set(NAMES) - VECTORS


def test_layer_decay_goes_down_from_the_head_of_each_tower():
    by_hand = {
        "visual.embed": 0.125, "visual.blocks.0": 0.25, "visual.blocks.1": 0.5, "visual.head": 1.0,
        "text.embed": 0.25, "text.blocks.0": 0.5, "text.head": 1.0,
    }  # fmt: skip
    for name, (scale, decay) in values(layer_decay=0.5).items():
        assert [scale] == [by_hand[part] for part in by_hand if name.startswith(part + ".")], name
        assert decay == (0.0 if name in VECTORS else 0.1), name


def test_of_the_rules_that_match_the_last_counts_key_by_key():
    rules = [
        {"match": r"^text\.", "lr_scale": 0.25, "weight_decay": 0.3}, {"match": r"^text\.head\.", "lr_scale": 2},
        {"match": r"qkv\.weight$", "weight_decay": 0},
    ]  # fmt: skip
    for name, (scale, decay) in values(rules=rules).items():
        text, head = name.startswith("text."), name.startswith("text.head.")
        assert scale == (2.0 if head else 0.25 if text else 1.0), name
        plain = 0.3 if text else 0.0 if name in VECTORS else 0.1
        assert decay == (0.0 if name.endswith("qkv.weight") else plain), name
    both = values(rules=rules, layer_decay=0.5)
    assert both["text.blocks.0.mlp.fc1.weight"] == (0.125, 0.3) and both["text.head.projection.weight"] == (2.0, 0.3)


def test_a_rule_that_matches_nothing_is_named():
    optim = OptimSection(rules=[{"match": "^text", "lr_scale": 0}, {"match": "^txt", "lr_scale": 0}])
    for check in (
        lambda: parameter_groups(MODEL, optim),
        lambda: check_rules(resolve_preset("demo"), ModelSection(), optim),
    ):
        with pytest.raises(UserError, match=r"`optim.rules`: `\^txt` matches no parameter"):
            check()


def test_before_a_run_rules_are_held_against_what_it_trains():
    config, text = resolve_preset("demo"), OptimSection(rules=[{"match": r"^text\.", "lr_scale": 0}])
    check_rules(config, ModelSection(), text)
    with pytest.raises(UserError, match=r"`\^text\\.` matches no parameter of this model that is trained"):
        check_rules(config, ModelSection(lock="text"), text)
    with pytest.raises(UserError, match="leave something to train"):
        check_rules(config, ModelSection(lock="image"), text)
    with pytest.raises(UserError, match="model.unlocked_layers is 99"):
        check_rules(config, ModelSection(lock="image", unlocked_layers=99), OptimSection())


def test_the_learning_rate_is_scaled_by_group_and_a_factor_of_0_freezes():
    model = Clip(resolve_preset("demo", vision_layers=1, text_layers=1))
    optim = OptimSection(rules=[{"match": r"^visual\.", "lr_scale": 0}])
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), lr=1.0)
    set_learning_rate(optimizer, 0.5)
    assert {(g["lr_scale"], g["lr"]) for g in optimizer.param_groups} == {(0.0, 0.0), (1.0, 0.5)}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(p, before[n]) == n.startswith("visual.") for n, p in model.named_parameters())
