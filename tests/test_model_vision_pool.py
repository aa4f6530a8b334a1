"""A model without a class token: against a reference of its own, through chunks, counted, and where it can't go."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dsclip.convert.hf import export_hf, hf_config
from dsclip.convert.init import load_init, resize_positions
from dsclip.convert.weights import to_openclip
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import PRESETS, resolve_preset
from dsclip.model.flops import forward_flops
from dsclip.plan.memory import towers
from dsclip.train.inputs import read_inputs
from tests.test_model_clip import SMALL, gradients, pairs

POOLS = ["class", "average"]


def reference(weights: dict, config, images: torch.Tensor, visible=None) -> torch.Tensor:
    """Unit features by torch's own modules, in the words of the papers: no chunk, no patch that was cut by hand."""
    w = {name.removeprefix("visual."): x for name, x in weights.items()}
    width, heads = config.vision_width, config.vision_heads
    patches = F.conv2d(images, w["embed.patch_embedding.weight"], stride=config.patch_size).flatten(2).mT
    tokens = patches
    if config.vision_pool == "class":
        tokens = torch.cat([w["embed.class_embedding"].expand(len(images), 1, -1), patches], dim=1)
    tokens = tokens + w["embed.position_embedding"]
    if visible is not None:
        first = len(tokens[0]) - len(patches[0])
        chosen = tokens[:, first:].gather(1, visible[..., None].expand(-1, -1, width))
        tokens = torch.cat([tokens[:, :first], chosen], dim=1)
    tokens = F.layer_norm(tokens, (width,), w["embed.ln_pre.weight"], w["embed.ln_pre.bias"])
    for i in range(config.vision_layers):
        layer = torch.nn.TransformerEncoderLayer(
            width, heads, config.vision_mlp_width, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
        names = {
            "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.out.", "linear1.": "mlp.fc1.",
            "linear2.": "mlp.fc2.", "norm1.": "ln_1.", "norm2.": "ln_2.",
        }  # fmt: skip
        layer.load_state_dict(
            {
                theirs + kind: w[f"blocks.{i}.{ours}{kind}"]
                for theirs, ours in names.items()
                for kind in ("weight", "bias")
            }
        )
        tokens = layer(tokens)
    tokens = F.layer_norm(tokens, (width,), w["head.ln_post.weight"], w["head.ln_post.bias"])
    pooled = tokens[:, 0] if config.vision_pool == "class" else tokens.mean(dim=1)
    features = pooled @ w["head.projection.weight"].T
    return features / features.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("pool", POOLS)
def test_features_are_those_of_a_plain_transformer(pool, dropped):
    torch.manual_seed(0)
    model = create_model("demo", **SMALL, vision_pool=pool).double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    visible = torch.tensor([[0, 3, 15], [1, 2, 3], [7, 8, 14]]) if dropped else None
    found = model(images, chunk_size=2, visible_patches=visible)[0]
    expected = reference(model.state_dict(), model.config, images, visible)
    torch.testing.assert_close(found.double(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
def test_chunks_and_recomputation_leave_its_gradients_unchanged(checkpointing):
    model = create_model("demo", **SMALL, vision_pool="average").double()
    visible = torch.arange(7)[:, None] + torch.arange(5)
    options = dict(chunk_size=3, checkpointing=checkpointing, visible_patches=visible)
    torch.testing.assert_close(
        gradients(model, **options), gradients(model, visible_patches=visible), rtol=1e-11, atol=1e-13
    )


def test_the_average_is_added_up_in_float32():
    model = create_model("demo", **SMALL, vision_pool="average").bfloat16()
    head, tokens = model.visual.head, (5 + torch.randn(2, 256, 128)).bfloat16()
    mean = head.ln_post(tokens).float().mean(dim=1).bfloat16()
    assert torch.equal(head(tokens), F.normalize(head.projection(mean).float(), dim=-1))


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_operations_and_memory_are_counted_for_the_tokens_that_are_computed(pool, dropout):
    config = resolve_preset("demo", vision_pool=pool, patch_dropout=dropout)
    model = create_model("demo", vision_pool=pool)
    visible = None if not dropout else torch.arange(config.visible_patches).expand(2, -1)
    seen = []
    model.visual.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.extend(x.shape[1] for x in inputs[1:]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pairs(2)[0], visible_patches=visible)
    assert seen == [config.class_tokens + config.visible_patches] == [towers(config, None)[0].tokens]
    assert counter.get_total_flops() == 2 * forward_flops(config)[0]


def test_a_patch_of_14_pixels_makes_a_multiple_of_64_tokens():
    assert resolve_preset("ViT-L-14", vision_pool="average").image_tokens == 256
    assert PRESETS["ViT-L-14"].image_tokens == 257


def test_token_wise_features_are_of_every_patch():
    model = create_model("demo", **SMALL, vision_pool="average")
    assert model(*pairs(), token_wise=True)[0].shape == (7, 16, 128)


def test_positions_are_resized_without_a_class_token():
    positions = torch.randn(17, 8)
    assert torch.equal(resize_positions(positions, 64)[1:], resize_positions(positions[1:], 64, class_tokens=0))
    assert resize_positions(positions[1:], 16, class_tokens=0) is not None


@pytest.mark.parametrize(("ours", "theirs"), [("average", "class"), ("class", "average")])
def test_weights_of_the_other_kind_are_refused_with_what_to_do(ours, theirs, tmp_path):
    weights = create_model("demo", vision_pool=theirs).state_dict()
    torch.save(dict(to_openclip(weights.items(), 10.0, None)), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=f"vision_pool {theirs} against {ours}.*set model.vision_pool={theirs}"):
        load_init(tmp_path / "weights.pt", resolve_preset("demo", vision_pool=ours))


def test_a_clip_model_can_not_express_it_and_a_run_says_so_before_it_trains(tmp_path, demo):
    config = resolve_preset("demo", vision_pool="average")
    with pytest.raises(UserError, match="a CLIPModel always has one"):
        hf_config(config, None)
    with pytest.raises(UserError, match="a CLIPModel always has one"):
        export_hf(SimpleNamespace(config=config), tmp_path / "hf")
    assert not list(tmp_path.iterdir())
    keys = ["model.vision_pool=average", f"train.output={tmp_path}"]
    with pytest.raises(UserError, match="always has one.* Set train.export_hf=false"):
        read_inputs(Namespace(config="demo", ds_config="zero3_bf16", resume="none", overrides=keys))
    keys.append("train.export_hf=false")
    inputs = read_inputs(Namespace(config="demo", ds_config="zero3_bf16", resume="none", overrides=keys))
    assert inputs.model.image_tokens == 16


def test_an_unknown_pool_is_named():
    with pytest.raises(UserError, match="model.vision_pool is `mean`; choose from class, average, attention"):
        resolve_preset("demo", vision_pool="mean")
