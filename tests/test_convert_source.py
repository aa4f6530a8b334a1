"""All ways in read weights alike: what a folder says counts or is contradicted by name, and nothing that isn't a number comes in."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from dsclip.checkpoint.manifest import write_manifest
from dsclip.convert import export_hf, load_init
from dsclip.convert.init import starting_config
from dsclip.convert.source import HIDDEN, open_source
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.evaluate.cli import _parser, evaluate
from tests.test_checkpoint_manifest import STATE
from tests.test_convert import SCALE, checkpoint_of, inputs, perturbed, small
from tests.test_train_evaluation import OFF, plan

UNUSUAL = dict(
    vision_heads=2, text_heads=8, activation="quick_gelu", layer_norm_eps=1e-3, image_mean=[0.5] * 3, image_std=[0.25] * 3
)  # fmt: skip
SHAPES = dict(vision_layers=2, text_layers=2, vocab_size=612)


@pytest.fixture(scope="module")
def model():
    return perturbed(small("demo", **UNUSUAL))


@pytest.fixture
def folder(model, demo, tmp_path):
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    return tmp_path / "hf"


def change(file, section=None, **values):
    """Other values in a JSON file; None removes a field."""
    content = json.loads(file.read_text())
    part = content[section] if section else content
    part.update(values)
    for name in [n for n, v in part.items() if v is None]:
        del part[name]
    file.write_text(json.dumps(content))


def evaluated(folder) -> dict:
    options = ["--model", str(folder), "--task", "zeroshot", "--data", "demo:val", "--max-samples", "8"]
    return evaluate(_parser().parse_args(options))


@torch.no_grad()
def difference(ours, theirs) -> float:
    images, tokens = inputs(ours.config)
    output = theirs.eval()(input_ids=tokens, pixel_values=images)
    image, text = ours(images, tokens)
    return max((image - output.image_embeds).abs().max().item(), (text - output.text_embeds).abs().max().item())


def test_what_shapes_do_not_show_comes_from_the_folder_on_every_way_in(model, folder, tmp_path):
    """Heads, activation, epsilon, colours and end token of the demo preset are others: features would be 0.1 off."""
    created = create_model("demo", init=str(folder), **SHAPES)
    assert created.config == model.config == open_source(folder).config()
    assert difference(created, CLIPModel.from_pretrained(folder)) <= 1e-5
    planned = plan(tmp_path, f"model.init={folder}", "model.vision_layers=2", "model.text_layers=2", *OFF)
    assert planned.model == replace(model.config, patch_dropout=planned.model.patch_dropout)
    weights, scale = load_init(folder, planned.model)
    assert scale == pytest.approx(SCALE) and torch.equal(
        weights["text.head.ln_final.bias"], model.text.head.ln_final.bias
    )


@pytest.mark.parametrize("name", HIDDEN)
def test_what_the_folder_says_otherwise_is_refused_by_name(name, model, folder):
    other = {"activation": "gelu", "layer_norm_eps": 1e-5, "eot_token_id": 5, "vision_heads": 4, "text_heads": 4}
    value = other.get(name, [0.1, 0.2, 0.3])
    with pytest.raises(UserError, match=rf"is another model than this one: {name} .*set model\.{name}="):
        create_model("demo", init=str(folder), **SHAPES | {name: value})
    with pytest.raises(UserError, match=name):
        load_init(folder, replace(model.config, **{name: value}))


def test_a_run_that_is_resumed_keeps_the_model_it_began_with(tmp_path):
    """Also when the weights it began with are gone."""
    checkpoint = tmp_path / "step_00000003"
    checkpoint.mkdir()
    write_manifest(checkpoint, STATE | {"model": STATE["model"] | UNUSUAL})
    config = starting_config(checkpoint, "demo")
    assert (config.activation, config.vision_heads, config.image_std) == ("quick_gelu", 2, (0.25, 0.25, 0.25))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("way", ["create", "init", "evaluate", "convert", "scale", "overflow"])
def test_weights_that_are_not_finite_are_refused_with_their_name(way, value, model, folder, demo, tmp_path):
    file, name = folder / "model.safetensors", "visual_projection.weight"
    weights = load_file(file)
    weights["logit_scale" if way == "scale" else name].view(-1)[0] = value
    save_file(weights, file, metadata={"format": "pt"})
    message = "1 of the 16384 values of visual.head.projection.weight are not finite"
    if way == "evaluate":
        with pytest.raises(UserError, match=message):
            evaluated(folder)
        return
    with pytest.raises(UserError, match="the logit scale is" if way == "scale" else "not finite") as error:
        if way in ("create", "scale"):
            create_model("demo", init=str(folder), **SHAPES)
        elif way == "init":
            load_init(folder, model.config)
        else:
            checkpoint = checkpoint_of(model, demo)
            checkpoint.state_dict["visual.head.projection.weight"][0, 0] = 1e5 if way == "overflow" else value
            export_hf(checkpoint, tmp_path / "out", dtype="fp16" if way == "overflow" else "fp32")
    assert way == "scale" or name.replace("visual_", "") in str(error.value).replace("visual.head.", "").replace(
        "visual_", ""
    )
    assert not (tmp_path / "out").exists()


def test_the_legacy_end_token_of_an_enlarged_vocabulary_is_the_tokenizers(demo, tmp_path):
    """Rows were added behind the end token, 611: the last id of the vocabulary is not it."""
    larger = perturbed(replace(small("demo"), vocab_size=620))
    export_hf(checkpoint_of(larger, demo), tmp_path / "hf")
    change(tmp_path / "hf" / "config.json", "text_config", eos_token_id=2)
    assert open_source(tmp_path / "hf").config() == larger.config
    read = create_model("demo", init=str(tmp_path / "hf"), **SHAPES | {"vocab_size": 620})
    assert difference(read, CLIPModel.from_pretrained(tmp_path / "hf")) <= 1e-5

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hf" / name).unlink()
    with pytest.raises(UserError, match="doesn't say which token ends a caption"):
        open_source(tmp_path / "hf").config()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        create_model("demo", init=str(tmp_path / "hf"), **SHAPES | {"vocab_size": 620, "eot_token_id": 611})
    assert any("assumed is: eot_token_id 611" in str(w.message) for w in said)


def test_a_tokenizer_with_another_end_token_is_refused(folder):
    change(folder / "config.json", "text_config", eos_token_id=600)
    with pytest.raises(UserError, match="ends captions with token 611 and"):
        evaluated(folder)


def test_captions_without_an_end_token_are_refused(model):
    _, tokens = inputs(model.config)
    tokens[3] = tokens[3].clamp_max(600)
    with pytest.raises(UserError, match="1 of 5 captions have no end token 611"):
        model(None, tokens)
    with pytest.raises(UserError, match="eot_token_id is 49407, and model.vocab_size 612"):
        create_model("demo", vocab_size=612)


@pytest.mark.parametrize("name", ["text_projection.weight", "visual_projection.weight", "logit_scale"])
def test_a_folder_that_is_no_whole_model_is_refused(name, folder):
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"has no {name}: it is no whole CLIPModel"):
        evaluated(folder)


def test_variants_beside_the_weights_are_not_read(model, folder):
    weights = {name: torch.full_like(tensor, 7) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.zz.safetensors")
    assert torch.equal(dict(open_source(folder).weights())["text.head.ln_final.bias"], model.text.head.ln_final.bias)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_logit_scale_stays_in_float32(dtype, model, demo, tmp_path):
    export_hf(replace(checkpoint_of(model, demo), logit_scale=20.0), tmp_path / "hf", dtype=dtype)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as stored:
        assert stored.get_tensor("logit_scale").dtype == torch.float32
    assert open_source(tmp_path / "hf").scale == pytest.approx(20.0, rel=1e-6)


@pytest.mark.parametrize(
    "file, values, words",
    [
        ("preprocessor_config.json", {"resample": 2}, "resample 2"),
        ("preprocessor_config.json", {"size": {"height": 64, "width": 64}}, "size {'height': 64"),
        ("preprocessor_config.json", {"do_center_crop": False}, "do_center_crop False"),
        (
            "processor_config.json",
            {"image_processor": {"image_mean": [0.5] * 3, "image_std": [1] * 3, "size": 70}},
            "size 70",
        ),
    ],
)
def test_images_that_are_prepared_otherwise_are_said_to_be(file, values, words, model, folder):
    if file == "processor_config.json":
        (folder / file).write_text("{}")
    change(folder / file, **values)
    (note,) = open_source(folder).notes(model.config)
    assert "prepared otherwise than here" in note and words in note


def test_longer_contexts_stretch_the_positions_and_shorter_ones_cut_them(model, folder):
    longer = create_model("demo", init=str(folder), **SHAPES | {"context_length": 64})
    shorter = create_model("demo", init=str(folder), **SHAPES | {"context_length": 20})
    positions = model.text.embed.position_embedding
    assert longer.text.embed.position_embedding.shape == (64, 128)
    middle = longer.text.embed.position_embedding[1:-1]
    torch.testing.assert_close(middle[::2] + middle[1::2], positions[:-1] + positions[1:], atol=1e-6, rtol=1e-5)
    _, tokens = inputs(shorter.config)
    with torch.no_grad():
        padded = torch.nn.functional.pad(tokens, (0, 12))
        torch.testing.assert_close(shorter(None, tokens)[1], model(None, padded)[1])
