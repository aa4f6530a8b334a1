"""`model.preset: FILE.json`: an OpenCLIP model configuration is a model's shape, everywhere that a preset's name is."""

import json
from argparse import Namespace

import pytest
import torch

from dsclip.convert.init import starting_config
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import PRESETS, Clip, resolve_preset
from dsclip.train.inputs import read_inputs
from tests.programs import run_program

# As OpenCLIP 3.3.0 writes its own.
B_16 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}  # fmt: skip
SMALL = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 96, "head_width": 48, "patch_size": 16, "mlp_ratio": 2.0, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 16, "vocab_size": 612, "width": 64, "heads": 2, "layers": 1},
}  # fmt: skip


def written(folder, content):
    path = folder / "model.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_file_says_what_the_preset_of_that_name_does(tmp_path):
    assert resolve_preset(written(tmp_path, B_16)) == PRESETS["ViT-B-16"]
    assert resolve_preset(written(tmp_path, {"model_cfg": B_16})) == PRESETS["ViT-B-16"]
    overridden = resolve_preset(written(tmp_path, B_16), vision_layers=3, activation=None)
    assert overridden == resolve_preset("ViT-B-16", vision_layers=3)


def test_every_field_is_read(tmp_path):
    config = create_model(written(tmp_path, SMALL)).config
    assert (config.embed_dim, config.image_size, config.patch_size, config.patch_dropout) == (64, 32, 16, 0.5)
    assert (config.vision_width, config.vision_heads, config.vision_mlp_width) == (96, 2, 192)
    assert (config.text_heads, config.text_layers, config.context_length) == (2, 1, 16)
    assert (config.vocab_size, config.eot_token_id, config.activation) == (612, 611, "quick_gelu")


def test_recipes_take_it_and_plans_know_it(tmp_path, demo):
    path = written(tmp_path, SMALL)
    keys = [f"model.preset={path}", f"train.output={tmp_path}"]
    inputs = read_inputs(Namespace(config="demo", ds_config="zero3_bf16", resume="none", overrides=keys))
    assert (inputs.model.embed_dim, inputs.model.vision_width, inputs.model.activation) == (64, 96, "quick_gelu")
    assert inputs.model.vocab_size == inputs.tokenizer.vocab_size
    found = json.loads(
        run_program("tools/plan.py", "--preset", written(tmp_path, B_16), "--gpu", "H100", "--json").stdout
    )
    assert found["parameters"] == pytest.approx(149.6e6, rel=1e-3)


def test_its_activation_is_not_that_of_the_weights(tmp_path):
    """Named presets leave the activation to the weights, unless their name says quickgelu; so does a file."""
    source = {"model_cfg": json.loads(json.dumps(SMALL)) | {"quick_gelu": False}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(source))
    assert starting_config(tmp_path, written(tmp_path, SMALL)).activation == "quick_gelu"
    assert starting_config(tmp_path, "ViT-B-16").activation == "gelu"


@pytest.mark.parametrize(
    "section, values, sentence",
    [
        ("vision_cfg", {"timm_model_name": "vit_base"}, "needs an image tower of timm"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "a ResNet as image tower"),
        ("vision_cfg", {"laters": 3}, r"not known here \(vision_cfg.laters: 3\)"),
        ("vision_cfg", {"image_size": 40}, "image_size 40 is no multiple of model.patch_size 16"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "needs a text tower of transformers"),
        ("text_cfg", {"layers": "12"}, "text_layers is '12', not a whole number"),
        (None, {"init_logit_bias": -10}, "init_logit_bias is a run's here: .* loss.name=sigmoid loss.init_bias=-10"),
        (None, {"embed_dim": None}, "embed_dim is None, not a whole number"),
        (None, {"vision_cfg": 3}, "no configuration of an OpenCLIP model"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(section, values, sentence, tmp_path):
    content = json.loads(json.dumps(SMALL))
    (content if section is None else content[section]).update(values)
    with pytest.raises(UserError, match=sentence):
        resolve_preset(written(tmp_path, content))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        resolve_preset(str(tmp_path / "nowhere.json"))
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="no configuration of an OpenCLIP model"):
        resolve_preset(str(tmp_path / "a.json"))
    squashed = {"model_cfg": B_16, "preprocess_cfg": {"resize_mode": "squash"}}
    with pytest.raises(UserError, match="not prepared like this here: resize_mode squash"):
        resolve_preset(written(tmp_path, squashed))


def test_openclips_own_configurations_have_its_parameters_or_are_refused(tmp_path):
    """All of its package's; what is refused is refused for what it needs."""
    open_clip = pytest.importorskip("open_clip")
    loaded = []
    for name in open_clip.list_models():
        content = open_clip.get_model_config(name)
        try:
            config = resolve_preset(written(tmp_path, content))
        except UserError as error:
            assert ": this model needs " in str(error), name
            continue
        content.pop("custom_text", None)
        with torch.device("meta"):
            theirs, ours = open_clip.model.CLIP(**content), Clip(config)
        assert ours.parameter_count() == sum(p.numel() for p in theirs.parameters()) - 1, name  # the logit scale
        loaded.append(name)
    assert len(loaded) >= 39 and {"ViT-B-16-plus", "ViT-H-14-378-quickgelu", "ViT-e-14", "ViT-M-16-alt"} < set(loaded)
