"""The towers: sizes, initialisation, chunking, text cutting, patch dropout."""

import pytest
import torch

from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import resolve_preset
from dsclip.model.blocks import Block
from dsclip.model.patch_dropout import visible_patches
from dsclip.model.towers import per_channel

# Of both towers and the logit scale: counted in OpenCLIP 3.3.0's own models, built from its model_configs.
PARAMETERS = {
    "ViT-S/32": 63_085_825, "ViT-S/16": 62_257_537, "ViT-M/32": 103_119_873, "ViT-M/16": 102_015_489,
    "ViT-B/32": 151_277_313, "ViT-B/32-256": 151_288_833, "ViT-B/16": 149_620_737, "ViT-B/32-plus-256": 210_297_473,
    "ViT-B/16-plus": 208_351_361, "ViT-B/16-plus-240": 208_377_345, "ViT-L/16": 427_739_393, "ViT-L/16-320": 427_948_289,
    "ViT-L/14": 427_616_513, "ViT-L/14-280": 427_763_969, "ViT-L/14-336": 427_944_193, "ViT-H/16": 986_263_041,
    "ViT-H/14": 986_109_441, "ViT-H/14-378-quickgelu": 986_714_881, "ViT-g/14": 1_366_678_273,
    "ViT-bigG/14": 2_539_567_105, "ViT-e/14": 4_581_086_465,
}  # fmt: skip
SMALL = dict(vocab_size=60, eot_token_id=59, context_length=24, vision_layers=2)


def pairs(n=7, size=64, context=24):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 59, (n, context), generator=generator)
    tokens[torch.arange(n), torch.arange(n) % 11 + 1] = 59
    return images, tokens


@pytest.mark.parametrize("preset", PARAMETERS)
def test_parameter_count_on_the_meta_device(preset):
    with torch.device("meta"):
        model = create_model(preset)
    logit_scale = 1
    assert model.parameter_count() + logit_scale == PARAMETERS[preset]


def test_quickgelu_suffix_and_unknown_names():
    assert resolve_preset("ViT-B/32-quickgelu").activation == "quick_gelu"
    assert resolve_preset("ViT-B/32-quickgelu", activation=None).activation == "quick_gelu", "as a recipe gives it"
    with pytest.raises(UserError, match="model.preset is ViT-B-32-quickgelu and model.activation is gelu"):
        resolve_preset("ViT-B-32-quickgelu", activation="gelu")
    with pytest.raises(UserError, match="Did you mean `ViT-B-32`"):
        resolve_preset("ViT-B-23")
    with pytest.raises(UserError, match="Did you mean `vision_width`"):
        resolve_preset("ViT-B-32", vision_widht=3)
    with pytest.raises(UserError, match="vision_heads"):
        resolve_preset("demo", vision_heads=5)


def test_features_are_unit_rows_in_float32():
    model = create_model("demo", **SMALL).bfloat16()
    for features in model(*pairs()):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=1), torch.ones(7))


def gradients(model, **options):
    model.zero_grad()
    image, text = model(*pairs(), **options)
    ((image @ text.T).sin().sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        dict(chunk_size=2),
        dict(chunk_size=3, checkpointing="full"),
        dict(checkpointing="selective"),
        dict(chunk_size=2, checkpointing="offload"),
    ],
)
def test_chunks_and_recomputation_leave_gradients_unchanged(options):
    model = create_model("demo", **SMALL).double()
    torch.testing.assert_close(gradients(model, **options), gradients(model), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_in_pieces_is_the_block_bit_for_bit(causal):
    """The pieces that selective checkpointing saves between are the two lines of `forward`."""
    torch.manual_seed(0)
    block = Block(32, 4, 64, "gelu", 1e-5, causal=causal, text_layers=2 if causal else None)
    x = torch.randn(3, 7, 32)
    results = []
    for forward in (block, block.forward_selective):
        chunk = x.clone().requires_grad_()
        output = forward(chunk)
        grads = torch.autograd.grad(output.sin().sum(), [chunk, *block.parameters()])
        results.append([output, *grads])
    for others in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(others, results[0], strict=True))


@pytest.mark.parametrize("frozen", ["", "mlp.fc2.weight", "mlp.fc2.bias"])
def test_a_block_run_again_for_its_graph_has_the_gradients_of_forward_bit_for_bit(frozen):
    """The last product is left out; the gradients don't depend on its result."""
    torch.manual_seed(0)
    block = Block(32, 4, 64, "gelu", 1e-5, causal=False, text_layers=None)
    if frozen:
        block.get_parameter(frozen).requires_grad_(False)
    x, weights = torch.randn(3, 7, 32), torch.randn(3, 7, 32)
    results = []
    for forward in (block.forward, block.forward_again):
        chunk = x.clone().requires_grad_()
        inputs = [chunk, *(p for p in block.parameters() if p.requires_grad)]
        results.append(torch.autograd.grad(forward(chunk), inputs, weights))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_frozen_parameters_get_no_gradient():
    model = create_model("demo", **SMALL).double()
    model.visual.requires_grad_(False)
    image, text = model(*pairs(), chunk_size=3, checkpointing="full")
    (image @ text.T).sin().sum().backward()
    assert all(p.grad is None for p in model.visual.parameters())
    assert all(p.grad is not None for p in model.text.parameters())


def test_nothing_after_the_end_token_matters():
    model = create_model("demo", **SMALL).double()
    images, tokens = pairs()
    changed = tokens.clone()
    for row, end in enumerate((tokens == 59).int().argmax(dim=1).tolist()):
        changed[row, end + 1 :] = 59
    torch.testing.assert_close(model(None, changed)[1], model(None, tokens)[1])
    short = tokens.clone()
    short[:, 12:] = 0
    # The tower sees 16 tokens (the longest caption has 12) and gives what it would give on the whole context.
    uncut = model.text((short,), "none", (), (((short == 59).int().argmax(dim=1),),))[0]
    torch.testing.assert_close(model(None, short)[1], uncut)


def test_uint8_images_are_normalised_and_floats_are_not():
    model = create_model("demo", **SMALL).double()
    images, _ = pairs()
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.image_mean, model.config.image_std))
    normalised = ((images / 255) - mean) / std
    torch.testing.assert_close(model(images)[0], model(normalised.double())[0], rtol=1e-6, atol=1e-6)


def test_mean_and_deviation_are_copied_once_and_are_no_part_of_the_weights():
    model = create_model("demo", **SMALL)
    assert per_channel(model.visual.embed.mean, torch.device("cpu")) is per_channel(
        model.config.image_mean, torch.device("cpu")
    )
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_wrong_image_size_is_named():
    with pytest.raises(UserError, match=r"\[n, 3, 64, 64\]"):
        create_model("demo", **SMALL)(torch.zeros(1, 3, 32, 32))


def test_visible_patches_depend_on_seed_step_and_sample_only():
    ids = torch.tensor([5, 9, 123456789012345, -7])
    visible = visible_patches(ids, 49, 0.5, seed=1, step=2)
    assert visible.shape == (4, 24)
    torch.testing.assert_close(visible_patches(ids[2:3], 49, 0.5, seed=1, step=2), visible[2:3])
    assert not torch.equal(visible_patches(ids, 49, 0.5, seed=2, step=2), visible)
    assert not torch.equal(visible_patches(ids, 49, 0.5, seed=1, step=3), visible)
    assert all(len(set(row.tolist())) == 24 for row in visible)


def test_visible_patches_are_uniform():
    visible = visible_patches(torch.arange(4000), 16, 0.75, seed=0, step=0)
    counts = torch.bincount(visible.flatten(), minlength=16)
    expected = 4000 * 4 / 16
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_initialisation_is_clips():
    torch.manual_seed(0)
    model = create_model("ViT-S-32", vision_layers=1, text_layers=2)
    width, layers = 384, 2
    text = model.text.blocks[1]
    assert text.attn.qkv.weight.std().item() == pytest.approx(width**-0.5, rel=0.02)
    assert text.attn.out.weight.std().item() == pytest.approx(width**-0.5 * (2 * layers) ** -0.5, rel=0.02)
    assert text.mlp.fc1.weight.std().item() == pytest.approx((2 * width) ** -0.5, rel=0.02)
    assert model.text.embed.token_embedding.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.text.embed.position_embedding.std().item() == pytest.approx(0.01, rel=0.03)
    assert model.visual.embed.position_embedding.std().item() == pytest.approx(width**-0.5, rel=0.03)
    assert model.visual.head.projection.weight.std().item() == pytest.approx(width**-0.5, rel=0.02)


@pytest.mark.parametrize("field", ["vision_layers", "text_width", "embed_dim", "patch_size", "context_length"])
def test_sizes_below_one_are_refused(field):
    with pytest.raises(UserError, match=f"model.{field} is 0"):
        resolve_preset("demo", **{field: 0})
