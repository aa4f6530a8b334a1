"""Converted models: what transformers computes equals what dsclip computes, and wrong conversions would be noticed."""

import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor, pipeline

from dsclip.checkpoint import Checkpoint
from dsclip.convert import export_hf, load_hf_folder, load_init
from dsclip.convert.cli import check_bias
from dsclip.convert.weights import from_openclip, parts_in_hf, to_hf
from dsclip.data import load_tokenizer
from dsclip.data.decoding.transforms import eval_image
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from tests.test_data_decoding_images import photograph

SCALE = math.exp(4.0)
CASES = {
    "ViT-S-32": {}, "ViT-B-32-quickgelu": {}, "ViT-L-14": dict(image_size=56), "ViT-H-14": dict(image_size=56),
    "ViT-bigG-14": dict(image_size=56), "demo": {},
}  # fmt: skip


def perturbed(config) -> Clip:
    """Random weights with norms and biases that are not the identity, so that nothing is trivially equal."""
    torch.manual_seed(1)
    model = Clip(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" in name or name.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    return model


def checkpoint_of(model: Clip, demo: Path) -> Checkpoint:
    weights = {n: p.detach().clone() for n, p in model.state_dict().items()}
    return Checkpoint(Path("x"), model.config, weights, SCALE, demo / "tokenizer", 5, 50, {"train": {"name": "t"}})


def small(preset: str, **options):
    layers = dict(vision_layers=2, text_layers=2)
    tokens = {} if preset != "demo" else dict(vocab_size=612, eot_token_id=611)
    return resolve_preset(preset, **layers, **tokens, **options)


def inputs(config, n=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, config.image_size, config.image_size, generator=generator)
    tokens = torch.randint(0, config.eot_token_id, (n, config.context_length), generator=generator)
    tokens[torch.arange(n), torch.arange(n) * 3 + 1] = config.eot_token_id
    return images, tokens


@torch.no_grad()
def differences(model: Clip, theirs: CLIPModel) -> tuple[float, float, float]:
    images, tokens = inputs(model.config)
    image, text = model(images, tokens)
    output = theirs.eval()(input_ids=tokens, pixel_values=images)
    logits = SCALE * image @ text.T
    pairs = (
        (image, output.image_embeds),
        (text, output.text_embeds),
        (logits / SCALE, output.logits_per_image / SCALE),
    )
    return tuple((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("preset", CASES)
def test_transformers_computes_the_same(preset, demo, tmp_path):
    model = perturbed(small(preset, **CASES[preset]))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    theirs = CLIPModel.from_pretrained(tmp_path / "hf")
    assert max(differences(model, theirs)) <= 1e-5
    assert theirs.logit_scale.item() == pytest.approx(4.0)
    assert not list((tmp_path / "hf").glob("*.bin"))


@pytest.mark.parametrize(
    "field, value", [("hidden_act", "quick_gelu"), ("num_attention_heads", 2), ("layer_norm_eps", 1e-3)]
)
def test_a_wrong_configuration_would_be_noticed(field, value, demo, tmp_path):
    model = perturbed(small("demo"))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        config[tower][field] = value
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert max(differences(model, CLIPModel.from_pretrained(tmp_path / "hf"))[:2]) > 1e-4


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 2e-2), ("fp16", 2e-3)])
def test_half_precision_folders_load(dtype, tolerance, demo, tmp_path):
    model = perturbed(small("demo"))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf", dtype=dtype)
    stored = CLIPModel.from_pretrained(tmp_path / "hf", dtype="auto")
    assert stored.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert max(differences(model, stored.float())) < tolerance


def test_names_map_there_and_back_bit_for_bit():
    model = perturbed(small("demo"))
    theirs = dict(to_hf(model.state_dict().items(), SCALE))
    weights = {ours: torch.cat([theirs[n] for n in names]) for ours, names in parts_in_hf(theirs).items()}
    assert math.exp(theirs["logit_scale"]) == pytest.approx(SCALE)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())


def test_processor_and_pipeline_work_offline_and_agree(demo, tmp_path):
    model = perturbed(small("demo"))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    processor = CLIPProcessor.from_pretrained(tmp_path / "hf")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    labels = ["red ring", "blue star"]
    batch = processor(text=[f"a {x}" for x in labels], images=image, return_tensors="pt", padding=True)
    ours = eval_image(image, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.config.image_mean, model.config.image_std))
    torch.testing.assert_close(batch["pixel_values"][0], (ours / 255 - mean) / std, atol=1e-5, rtol=1e-5)

    classify = pipeline("zero-shot-image-classification", str(tmp_path / "hf"))
    answers = {a["label"]: a["score"] for a in classify(image, candidate_labels=labels, hypothesis_template="a {}")}
    tokenizer = load_tokenizer(str(tmp_path / "hf"))
    with torch.no_grad():
        features, text = model(ours[None], tokenizer([f"a {x}" for x in labels], 32))
    for label, probability in zip(labels, (SCALE * features @ text.T).softmax(dim=1)[0], strict=True):
        assert answers[label] == pytest.approx(probability.item(), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"activation": "quick_gelu", "image_size": 96}])
def test_files_and_captions_of_any_length_have_the_same_features_from_the_first_byte(options, demo, tmp_path):
    """Each side with its own decoding, preprocessing and tokenizer: pictures with the spectrum of photographs, captions padded and cut."""
    model = perturbed(small("demo", **options))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    theirs, processor = (
        CLIPModel.from_pretrained(tmp_path / "hf").eval(),
        CLIPProcessor.from_pretrained(tmp_path / "hf"),
    )
    captions = ["a red ring", "two blue stars above a green square", "a small yellow cross left of " * 9]
    pictures = [Image.open(io.BytesIO(photograph(*size, 1))) for size in ((211, 140), (97, 180), (64, 64))]
    batch = processor(text=captions, images=pictures, return_tensors="pt", padding=True, truncation=True)
    output = theirs(**batch)
    tokens = load_tokenizer(str(tmp_path / "hf"))(captions, model.config.context_length)
    assert tokens[2, -1] == model.config.eot_token_id, "it was cut"
    image, text = model(torch.stack([eval_image(p.convert("RGB"), model.config.image_size) for p in pictures]), tokens)
    assert (image - output.image_embeds).abs().max() <= 1e-5 and (text - output.text_embeds).abs().max() <= 1e-5


def test_the_bias_of_a_sigmoid_loss_is_not_dropped_without_a_word(demo, tmp_path):
    checkpoint = replace(checkpoint_of(perturbed(small("demo")), demo), logit_bias=-9.5)
    with pytest.raises(UserError, match="has the bias -9.5 of a sigmoid loss.*--without-bias"):
        check_bias(checkpoint, left_out=False)
    check_bias(checkpoint, left_out=True)
    check_bias(replace(checkpoint, logit_bias=None), left_out=False)
    export_hf(checkpoint, tmp_path / "hf")
    assert "whose bias -9.5 has no place in a CLIPModel" in (tmp_path / "hf" / "README.md").read_text()


def test_an_existing_folder_is_not_overwritten(demo, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        export_hf(checkpoint_of(perturbed(small("demo")), demo), tmp_path / "hf")
    assert (tmp_path / "hf" / "mine.txt").read_text() == "keep"


def test_a_converted_folder_is_read_back(demo, tmp_path):
    model = perturbed(small("demo", image_mean=[0.5, 0.5, 0.5]))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    config, weights, scale = load_hf_folder(tmp_path / "hf")
    assert config == replace(model.config, patch_dropout=0.0)
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    assert scale == pytest.approx(SCALE)


def test_code_named_in_a_configuration_is_neither_kept_nor_run(demo, tmp_path):
    export_hf(checkpoint_of(perturbed(small("demo")), demo), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    (tmp_path / "hf" / "modeling_x.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    path.write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_x.X"}}))
    loaded, _, _ = load_hf_folder(tmp_path / "hf")
    assert "auto_map" not in asdict(loaded) and not (tmp_path / "executed").exists()


def openclip_weights(model: Clip) -> dict[str, torch.Tensor]:
    """The model's weights under OpenCLIP's names, written out by hand."""
    w, out = model.state_dict(), {}
    out["visual.conv1.weight"] = w["visual.embed.patch_embedding.weight"]
    out["visual.class_embedding"] = w["visual.embed.class_embedding"]
    out["visual.positional_embedding"] = w["visual.embed.position_embedding"]
    out["visual.proj"] = w["visual.head.projection.weight"].T
    out["text_projection"] = w["text.head.projection.weight"].T
    out["token_embedding.weight"] = w["text.embed.token_embedding"]
    out["positional_embedding"] = w["text.embed.position_embedding"]
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = w[f"visual.embed.ln_pre.{kind}"]
        out[f"visual.ln_post.{kind}"] = w[f"visual.head.ln_post.{kind}"]
        out[f"ln_final.{kind}"] = w[f"text.head.ln_final.{kind}"]
        for ours, theirs in (("visual", "visual.transformer"), ("text", "transformer")):
            for i in range(len(getattr(model, ours).blocks)):
                block, target = f"{ours}.blocks.{i}", f"{theirs}.resblocks.{i}"
                out[f"{target}.attn.in_proj_{kind}"] = w[f"{block}.attn.qkv.{kind}"]
                out[f"{target}.attn.out_proj.{kind}"] = w[f"{block}.attn.out.{kind}"]
                out[f"{target}.mlp.c_fc.{kind}"] = w[f"{block}.mlp.fc1.{kind}"]
                out[f"{target}.mlp.c_proj.{kind}"] = w[f"{block}.mlp.fc2.{kind}"]
                for norm in ("ln_1", "ln_2"):
                    out[f"{target}.{norm}.{kind}"] = w[f"{block}.{norm}.{kind}"]
    return out | {"logit_scale": torch.tensor(4.0)}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_openclip_state_dicts_can_be_started_from(prefix, kind, tmp_path):
    model = perturbed(small("demo"))
    weights = {prefix + n: p.contiguous() for n, p in openclip_weights(model).items()}
    path = tmp_path / f"open_clip.{kind}"
    torch.save({"state_dict": weights}, path) if kind == "pt" else save_file(weights, path)
    read, scale = load_init(path, model.config)
    assert scale == pytest.approx(SCALE)
    assert all(torch.equal(read[n], p) for n, p in model.state_dict().items())
    assert from_openclip({"text.ln_final.bias": torch.ones(1)})[0].keys() == {"text.head.ln_final.bias"}


def test_another_image_size_resizes_the_positions(demo, tmp_path):
    model = perturbed(small("demo"))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    larger = small("demo", image_size=96)
    weights, _ = load_init(tmp_path / "hf", larger)
    Clip(larger).load_state_dict(weights)
    assert torch.equal(weights["visual.embed.position_embedding"][0], model.visual.embed.position_embedding[0])


def test_weights_that_do_not_fit_are_named(demo, tmp_path):
    model = perturbed(small("demo"))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    with pytest.raises(UserError, match="text_width 128 against 64. Set model.preset=auto"):
        load_init(tmp_path / "hf", small("demo", text_width=64, text_heads=4))
    with pytest.raises(UserError, match="text_layers 2 against 1"):
        load_init(
            tmp_path / "hf", resolve_preset("demo", text_layers=1, vision_layers=2, vocab_size=612, eot_token_id=611)
        )
    with pytest.raises(UserError, match="set model.activation=gelu"):
        load_init(tmp_path / "hf", replace(model.config, activation="quick_gelu"))
    with pytest.raises(UserError, match="no such file or folder"):
        load_init(tmp_path / "nowhere", model.config)


def test_a_poisoned_state_dict_is_refused_unopened(tmp_path):
    from tests.test_data_loader import Payload

    torch.save({"a": Payload(tmp_path / "executed")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="was not opened"):
        load_init(tmp_path / "evil.pt", small("demo"))
    assert not (tmp_path / "executed").exists()
