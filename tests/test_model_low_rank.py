"""Adapters in one process: exact products and gradients, what is frozen and kept, merged weights, and what is refused."""

import re

import pytest
import torch

from dsclip.config import load_recipe
from dsclip.config.schema import ModelSection
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.model.low_rank import DOWN, UP, MergedWeights
from dsclip.model.trained import choose_trained, trained_part
from tests.test_model_clip import SMALL, pairs
from tests.test_model_lock import MODES, backward, products

IMAGES, TOKENS = pairs()


def section(**keys) -> ModelSection:
    return ModelSection(**{"lora_rank": 3, "lora_alpha": 6.0} | keys)


def adapted(chosen: ModelSection, **overrides) -> Clip:
    """A model with adapters that already differ from nothing."""
    torch.manual_seed(0)
    clip = create_model("demo", **SMALL | overrides).double()
    choose_trained(clip, chosen)
    clip.double()
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if name.endswith(UP):
                parameter.normal_(std=0.05)
    return clip


def plain(clip: Clip, **overrides) -> Clip:
    """The model without adapters that has the merged weights."""
    model = create_model("demo", **SMALL | overrides).double()
    model.load_state_dict(dict(MergedWeights(clip.state_dict(), 2.0)))
    return model


@pytest.mark.parametrize("overrides", [{}, {"vision_layer_scale": 0.1}])
@pytest.mark.parametrize("targets", [["blocks"], ["visual.*attn", "text.head"]])
def test_merged_weights_give_the_features_of_the_adapters(targets, overrides):
    clip = adapted(section(lora_targets=targets), **overrides)
    for ours, merged in zip(clip(IMAGES, TOKENS), plain(clip, **overrides)(IMAGES, TOKENS), strict=True):
        torch.testing.assert_close(ours, merged, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("checkpointing", MODES)
def test_gradients_are_those_of_the_merged_weight(checkpointing, chunk_size):
    """Of W + s·B·A with the gradient G: s·G·Aᵀ for B and s·Bᵀ·G for A; and what is trained whole has the plain model's."""
    options = dict(checkpointing=checkpointing, chunk_size=chunk_size)
    clip = adapted(section(lora_full=["visual.head", "text.*ln_"]))
    ours, reference = backward(clip, **options), backward(plain(clip))
    weights = clip.state_dict()
    assert set(ours) == {n for n in weights if "lora" in n or re.search("visual.head|text.*ln_", n)}
    for name, gradient in ours.items():
        layer = name.removesuffix(DOWN).removesuffix(UP)
        if name.endswith(UP):
            expected = 2.0 * reference[layer + ".weight"] @ weights[layer + DOWN].T
        elif name.endswith(DOWN):
            expected = 2.0 * weights[layer + UP].T @ reference[layer + ".weight"]
        else:
            expected = reference[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


def test_adapters_begin_as_nothing():
    torch.manual_seed(0)
    clip = create_model("demo", **SMALL)
    before = clip(IMAGES, TOKENS)
    choose_trained(clip, section())
    assert all(torch.equal(a, b) for a, b in zip(before, clip(IMAGES, TOKENS), strict=True))


@pytest.mark.parametrize("checkpointing", MODES)
def test_frozen_weights_cost_no_product_of_their_gradient_and_layers_below_no_graph(checkpointing):
    def run(clip):
        image, text = clip(IMAGES, TOKENS, checkpointing=checkpointing, chunk_size=3)
        (image.sum() + text.sum()).backward()

    everything = products(lambda: run(create_model("demo", **SMALL).double()))
    blocks = products(lambda: run(adapted(section())))
    clip = adapted(section(lora_targets=["visual.blocks.1"]))
    assert (clip.visual.locked, clip.text.locked) == (2, len(clip.text.layers()))
    assert products(lambda: run(clip)) < blocks < 0.75 * everything
    assert not clip(None, TOKENS, checkpointing=checkpointing)[1].requires_grad


@pytest.mark.parametrize("preset", ["demo", "ViT-B-32", "ViT-L-14"])
def test_less_than_a_twentieth_is_trained(preset):
    config = resolve_preset(preset)
    part = trained_part(config, section(lora_rank=4))
    with torch.device("meta"):
        model = Clip(config)
    linear = [p for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2]
    assert part.parameters == part.beside == sum(4 * sum(p.shape) for p in linear)
    assert part.of == model.parameter_count() + part.beside and 0 < part.parameters < 0.05 * part.of
    assert str(part).startswith(f"{part.parameters:,} of {part.of:,} parameters are trained (")


def test_the_attention_pool_s_weight_that_is_cut_in_two_gets_no_adapter():
    with torch.device("meta"):
        clip = Clip(resolve_preset("ViT-B-16-SigLIP"))
        choose_trained(clip, section(lora_targets=["visual.head"]))
    names = {n.rpartition(".lora")[0] for n, p in clip.named_parameters() if p.requires_grad}
    assert names == {f"visual.head.pool.{n}" for n in ("out", "mlp.fc1", "mlp.fc2")}


@pytest.mark.parametrize("key", ["lora_targets", "lora_full"])
def test_an_expression_that_is_found_nowhere_is_named(key):
    with pytest.raises(
        UserError, match=f"`model.{key}`: `blcoks` is found in no name of this model. Names are such as"
    ):
        trained_part(resolve_preset("demo"), section(**{key: ["head", "blcoks"]}))


def test_adapters_beside_weights_that_are_all_trained_are_refused():
    with pytest.raises(UserError, match="`model.lora_full` matches every parameter: nothing would be frozen"):
        trained_part(resolve_preset("demo"), section(lora_full=["."]))


def test_a_rank_above_that_of_the_matrix_is_refused():
    assert trained_part(resolve_preset("demo"), section(lora_rank=128)).parameters
    with pytest.raises(
        UserError, match="`model.lora_rank` is 129, and visual.blocks.0.attn.qkv is a matrix of 384 x 128"
    ):
        trained_part(resolve_preset("demo"), section(lora_rank=129))


@pytest.mark.parametrize(
    "keys, words",
    [
        (["model.lora_rank=4", "model.init=x", "model.lock=text"], "adapters leave all weights locked"),
        (["model.lora_rank=4", "model.init=x", "model.lora_targets=[]"], "`model.lora_targets` is empty"),
        (["model.lora_rank=4", "model.init=x", "model.lora_targets=['(']"], "give a list of regular expressions"),
        (["model.lora_alpha=8.0"], "`model.lora_alpha` belongs to adapters; set `model.lora_rank` too"),
        (["model.lora_full=[head]"], "`model.lora_full` belongs to adapters"),
        (["model.lora_rank=4", "model.init=x", "loss.queue_size=512", "loss.queue_momentum=0.9"], "no moving average"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(keys, words):
    with pytest.raises(UserError, match=words):
        load_recipe("demo", keys)
