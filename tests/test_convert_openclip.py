"""OpenCLIP's models come in by their configuration; what weights don't show is said, and what dsclip's towers lack is named."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsclip.convert.source import open_source
from dsclip.convert.weights import to_openclip
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.evaluate.cli import _parser, evaluate
from dsclip.model.openclip_config import read_openclip_config
from tests.test_convert import SCALE, openclip_weights, perturbed, small

SHAPES = dict(vision_layers=2, text_layers=2, vocab_size=612)
UNUSUAL = dict(
    vision_heads=2, activation="quick_gelu", layer_norm_eps=1e-3, image_mean=[0.5] * 3, image_std=[0.25] * 3
)  # fmt: skip
CONFIG = {
    "model_cfg": {
        "embed_dim": 128, "quick_gelu": True,
        "vision_cfg": {
            "image_size": 64, "patch_size": 16, "width": 128, "layers": 2, "head_width": 64, "norm_kwargs": {"eps": 1e-3},
        },
        "text_cfg": {
            "context_length": 32, "vocab_size": 612, "width": 128, "heads": 4, "layers": 2, "norm_kwargs": {"eps": 1e-3},
            "pool_type": "eos", "eos_id": 611,
        },
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "shortest", "size": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return perturbed(small("demo", **UNUSUAL))


@pytest.fixture
def folder(model, tmp_path):
    save_file({n: p.contiguous() for n, p in openclip_weights(model).items()}, tmp_path / "open_clip_model.safetensors")
    return tmp_path


def configure(folder, section=None, **values):
    config = deepcopy(CONFIG)
    part = (
        config["model_cfg"]
        if section is None
        else config[section]
        if section in config
        else config["model_cfg"][section]
    )
    part.update(values)
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["", "open_clip_model.safetensors"])
def test_the_configuration_beside_the_weights_counts(name, model, folder):
    configure(folder)
    created = create_model("demo", init=str(folder / name), **SHAPES)
    assert created.config == model.config == open_source(folder / name).config()
    assert all(torch.equal(p, created.state_dict()[n]) for n, p in model.state_dict().items())
    assert open_source(folder / name).scale == pytest.approx(SCALE)
    with pytest.raises(UserError, match="vision_heads 2 against 4"):
        create_model("demo", init=str(folder), **SHAPES, vision_heads=4)


@pytest.mark.parametrize(
    "section, option, value, feature",
    [
        ("vision_cfg", "pool_type", "none", "another pooling than the class token's or the average"),
        ("vision_cfg", "global_average_pool", True, "average pooling"),
        ("vision_cfg", "attentional_pool", True, "attention pooling"),
        ("vision_cfg", "no_ln_pre", True, "an image tower without its first norm"),
        ("vision_cfg", "scaled_cosine_attn", True, "cosine attention"),
        ("vision_cfg", "act_kwargs", {"approximate": "tanh"}, "an activation with options"),
        ("vision_cfg", "timm_model_name", "vit_base", "an image tower of timm"),
        ("vision_cfg", "layers", [3, 4, 6, 3], "a ResNet"),
        ("vision_cfg", "pos_embed_type", "sin_cos_2d", "fixed position embeddings"),
        ("text_cfg", "pool_type", "last", "another pooling than the end token's"),
        ("text_cfg", "no_causal_mask", True, "a text tower without causal mask"),
        ("text_cfg", "hf_model_name", "roberta-base", "a text tower of transformers"),
        ("text_cfg", "proj_bias", True, "a bias in the text projection"),
        ("text_cfg", "proj_type", "none", "a text projection that isn't linear"),
        ("text_cfg", "something_new", 3, "an option that is not known here"),
        (None, "multimodal_cfg", {}, r"a caption decoder \(CoCa\)"),
    ],
)
def test_features_that_weights_do_not_show_are_refused_by_name(section, option, value, feature, folder):
    configure(folder, section, **{option: value})
    with pytest.raises(UserError, match=rf"needs {feature}.*{option}"):
        create_model("demo", init=str(folder), **SHAPES)
    with pytest.raises(UserError, match=option):
        open_source(folder)


def test_the_norm_of_an_average_is_refused_and_the_average_of_norms_is_read(folder):
    configure(folder, "vision_cfg", pool_type="avg", final_ln_after_pool=True)
    with pytest.raises(UserError, match="the norm of an average, where dsclip averages what is normalised"):
        open_source(folder)
    configure(folder, "vision_cfg", pool_type="avg")
    source = open_source(folder)
    assert (source.said["vision_pool"], source.said["vision_registers"]) == ("average", 1)
    weights, theirs = dict(source.weights()), load_file(folder / "open_clip_model.safetensors")
    assert torch.equal(
        weights["visual.embed.registers"][0],
        theirs["visual.class_embedding"] + theirs["visual.positional_embedding"][0],
    )
    assert torch.equal(weights["visual.embed.position_embedding"], theirs["visual.positional_embedding"][1:])
    assert create_model("demo", init=str(folder), **SHAPES).config.vision_registers == 1


@pytest.mark.parametrize("block_type, has_it", [(None, True), ("custom", True), ("default", False)])
def test_towers_options_are_read_for_each_tower(block_type, has_it, folder):
    """OpenCLIP's default block has no QK-norm, whatever the option says."""
    configure(folder, "vision_cfg", qk_norm=True, block_type=block_type)
    said, _ = read_openclip_config(folder / "open_clip_config.json")
    assert (said["vision_qk_norm"], said["text_qk_norm"]) == (has_it, False)
    configure(folder, "text_cfg", ls_init_value=1e-4)
    said, _ = read_openclip_config(folder / "open_clip_config.json")
    assert (said["vision_layer_scale"], said["text_layer_scale"]) == (None, 1e-4)


def test_weights_show_layer_scale_and_qk_norm(tmp_path):
    options = dict(vision_layer_scale=0.1, text_qk_norm=True)
    model = perturbed(small("demo", **options))
    torch.save(dict(to_openclip(model.state_dict().items(), SCALE, None)), tmp_path / "a.pt")
    with pytest.warns(UserWarning, match="is assumed"):
        created = create_model(
            "demo", init=str(tmp_path / "a.pt"), **SHAPES, **options | {"vision_layer_scale": 0.3}, eot_token_id=611
        )
    assert all(torch.equal(p, created.state_dict()[n]) for n, p in model.state_dict().items())
    with pytest.raises(UserError, match="vision_layer_scale 1e-05 against None, text_qk_norm True against False"):
        create_model("demo", init=str(tmp_path / "a.pt"), **SHAPES, eot_token_id=611)


def test_towers_with_different_norms_and_broken_files_are_refused(folder):
    configure(folder, "text_cfg", norm_kwargs={"eps": 1e-6})
    with pytest.raises(UserError, match="one epsilon in both towers"):
        open_source(folder)
    for content in ("{", "[]", '{"model_cfg": {}}'):
        (folder / "open_clip_config.json").write_text(content)
        with pytest.raises(UserError, match="is no configuration of an OpenCLIP model"):
            open_source(folder)
    configure(folder)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights beside it"):
        open_source(folder)


@pytest.mark.parametrize(
    "name, feature",
    [
        ("visual.attn_pool.probe", "attention pooling"),
        ("visual.transformer.resblocks.0.attn.ln_inner.weight", "a norm inside attention"),
        ("visual.trunk.blocks.0.norm1.weight", "an image tower of timm"),
        ("visual.layer1.0.conv1.weight", "a ResNet"),
        ("text.transformer.embeddings.word_embeddings.weight", "a text tower of transformers"),
        ("text_projection.bias", "a bias in the text projection"),
        ("text_decoder.ln_final.weight", "a caption decoder"),
    ],
)
def test_features_that_weights_show_are_refused_by_name(name, feature, model, tmp_path):
    torch.save(openclip_weights(model) | {name: torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"these weights need {feature}.*{name}"):
        create_model("demo", init=str(tmp_path / "a.pt"), **SHAPES, eot_token_id=611)


def test_a_missing_first_norm_is_named(model, tmp_path):
    weights = {n: p for n, p in openclip_weights(model).items() if "ln_pre" not in n}
    torch.save(weights, tmp_path / "a.pt")
    with pytest.raises(UserError, match="an image tower without its first norm"):
        open_source(tmp_path / "a.pt")


def test_a_bare_file_says_what_is_assumed(model, tmp_path):
    torch.save(openclip_weights(model), tmp_path / "a.pt")
    with pytest.warns(
        UserWarning, match="vision_heads 4, text_heads 4, activation gelu, layer_norm_eps 1e-05, .*eot_token_id 611"
    ):
        created = create_model("demo", init=str(tmp_path / "a.pt"), **SHAPES, eot_token_id=611)
    assert created.config.activation == "gelu"
    with pytest.raises(UserError, match=r"vision_layers 2 against 4.*Set model.preset=auto"):
        create_model("demo", init=str(tmp_path / "a.pt"), vocab_size=612, eot_token_id=611)


def test_bare_files_are_evaluated_with_a_tokenizer(model, demo, tmp_path, capsys):
    weights = openclip_weights(perturbed(small("demo", vision_heads=2, text_heads=2)))  # heads 64 wide: what is assumed
    torch.save(weights, tmp_path / "a.pt")
    options = ["--model", str(tmp_path / "a.pt"), "--task", "zeroshot", "--data", "demo:val", "--max-samples", "16"]
    with pytest.raises(UserError, match="give the model's own with --tokenizer"):
        evaluate(_parser().parse_args(options))
    result = evaluate(_parser().parse_args([*options, "--tokenizer", "demo"]))
    assert result["metrics"]["samples"] == 8 and "vision_heads 2" in capsys.readouterr().err


def test_other_preprocessing_is_said(model, folder):
    configure(folder, "preprocess_cfg", resize_mode="squash", interpolation="bilinear")
    (note,) = open_source(folder).notes(model.config)
    assert "interpolation bilinear, resize_mode squash" in note
