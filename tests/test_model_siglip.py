"""SigLIP's towers: what transformers' SiglipModel computes, in and out, and trained through chunks as the whole batch."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoProcessor, SiglipConfig, SiglipModel, pipeline

from dsclip.checkpoint import read_checkpoint
from dsclip.config.schema import LossSection, OptimSection
from dsclip.convert import cli, export_hf
from dsclip.convert.hf import hf_class
from dsclip.convert.init import load_init_once
from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.source import open_source
from dsclip.create import create_model
from dsclip.data import load_tokenizer
from dsclip.distributed import Collectives
from dsclip.engine.loss_scalars import LossScalars
from dsclip.errors import UserError
from dsclip.model import Clip, resolve_preset
from dsclip.model.captions import cut_captions
from dsclip.model.flops import forward_flops
from dsclip.model.presets import SIGLIP
from tests.test_convert import checkpoint_of, perturbed

PARAMETERS = {
    "ViT-B-16-SigLIP": 203.16,
    "ViT-L-16-SigLIP-256": 652.15,
    "ViT-SO400M-14-SigLIP-384": 877.96,
}  # OpenCLIP's
BIAS = -12.5


def narrow(preset, **options):
    """The preset with its heads and proportions, two layers deep and 8 numbers a head wide; a margin that patches leave."""
    c = resolve_preset(preset)
    width, mlp = 8 * c.vision_heads, 8 * c.vision_heads * c.vision_mlp_width // c.vision_width
    return replace(
        c, embed_dim=width, vision_width=width, text_width=width, vision_mlp_width=mlp, text_mlp_width=mlp, vision_layers=2,
        text_layers=2, vocab_size=612, eot_token_id=611, image_size=3 * c.patch_size + 5, **options,
    )  # fmt: skip


def inputs(config, n=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, config.image_size, config.image_size, generator=generator)
    return images, torch.randint(0, config.vocab_size, (n, config.context_length), generator=generator)


def folder_of(model, demo, out, bias=BIAS, **options):
    export_hf(replace(checkpoint_of(model, demo), logit_bias=bias), out, **options)
    return out


def gradients(model, data, **options):
    model.zero_grad()
    image, text = model(*data, **options)
    (image @ text.T).sin().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@torch.no_grad()
def difference(ours, theirs):
    images, tokens = inputs(ours.config)
    image, text = ours(images, tokens)
    output = theirs.eval()(input_ids=tokens, pixel_values=images)
    return max((image - output.image_embeds).abs().max().item(), (text - output.text_embeds).abs().max().item())


@pytest.mark.parametrize("preset", SIGLIP)
def test_presets_have_the_published_sizes(preset):
    with torch.device("meta"):
        assert Clip(resolve_preset(preset)).parameter_count() / 1e6 == pytest.approx(PARAMETERS[preset], abs=0.006)


@pytest.mark.parametrize("preset", SIGLIP)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_a_siglip_model_computes_the_same_and_comes_back_bit_for_bit(preset, activation, demo, tmp_path):
    model = perturbed(narrow(preset, activation=activation))
    theirs = SiglipModel.from_pretrained(folder_of(model, demo, tmp_path / "hf"))
    assert difference(model, theirs) <= 1e-5
    images, tokens = inputs(model.config)
    with torch.no_grad():
        image, text = model(images, tokens)
        logits = theirs(input_ids=tokens, pixel_values=images).logits_per_image
    torch.testing.assert_close(open_source(tmp_path / "hf").scale * image @ text.T + BIAS, logits, rtol=1e-5, atol=1e-4)
    source = open_source(tmp_path / "hf")
    assert source.config() == model.config and source.logit_bias == BIAS
    assert all(torch.equal(p, model.state_dict()[n]) for n, p in source.weights())


def test_random_weights_of_transformers_come_in(demo, tmp_path):
    """Written by transformers, not by dsclip."""
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    theirs = SiglipModel(SiglipConfig(
        text_config=sizes | dict(vocab_size=612, eos_token_id=611, bos_token_id=610, max_position_embeddings=16),
        vision_config=sizes | dict(image_size=50, patch_size=16),
    ))  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "hf")
    load_tokenizer("demo").save(tmp_path / "hf")
    model = create_model("auto", init=str(tmp_path / "hf"))
    assert model.config.vision_pool == "attention" and model.config.activation == "gelu_tanh"
    assert difference(model, theirs) <= 1e-5


@pytest.mark.parametrize(
    "field, value", [("hidden_act", "quick_gelu"), ("num_attention_heads", 4), ("layer_norm_eps", 1e-2)]
)
def test_a_wrong_configuration_would_be_noticed(field, value, demo, tmp_path):
    model = perturbed(narrow("ViT-B-16-SigLIP"))
    file = folder_of(model, demo, tmp_path / "hf") / "config.json"
    config = json.loads(file.read_text())
    for tower in ("text_config", "vision_config"):
        config[tower][field] = value
    file.write_text(json.dumps(config))
    assert difference(model, SiglipModel.from_pretrained(tmp_path / "hf")) > 1e-4


def test_the_tool_goes_both_ways_and_keeps_the_bias(demo, tmp_path, capsys):
    source = folder_of(perturbed(narrow("ViT-B-16-SigLIP")), demo, tmp_path / "hf")
    for to, out in (("dsclip", "1"), ("hf", "2"), ("dsclip", "3")):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(source), str(tmp_path / out), "--to", to, "--json"])
        said = json.loads(capsys.readouterr().out)
        assert ended.value.code == 0 and said["max_difference"] <= 1e-5, said
        source = tmp_path / out
    assert read_checkpoint(source).logit_bias == BIAS
    assert "SiglipModel" in (tmp_path / "2" / "README.md").read_text()
    assert type(AutoModel.from_pretrained(tmp_path / "2")) is SiglipModel


def test_processor_and_pipeline_rank_as_dsclip_does(demo, tmp_path):
    from PIL import Image

    model = perturbed(narrow("ViT-B-16-SigLIP", context_length=64))
    folder_of(model, demo, tmp_path / "hf")
    image = Image.new("RGB", (60, 80), (200, 30, 60))
    labels = ["red ring", "blue star", "green square"]
    batch = AutoProcessor.from_pretrained(tmp_path / "hf")(
        text=labels, images=image, padding="max_length", max_length=64, return_tensors="pt"
    )
    tokens = load_tokenizer(str(tmp_path / "hf"))(labels, 64)
    assert torch.equal(batch["input_ids"], tokens)
    with torch.no_grad():
        features, text = model(batch["pixel_values"], tokens)
    answers = pipeline("zero-shot-image-classification", str(tmp_path / "hf"))(
        image, candidate_labels=labels, hypothesis_template="{}"
    )
    scores = (open_source(tmp_path / "hf").scale * features @ text.T + BIAS).sigmoid()[0]
    assert {a["label"]: a["score"] for a in answers} == pytest.approx(
        {label: score.item() for label, score in zip(labels, scores, strict=True)}, rel=1e-3
    )


def test_towers_that_transformers_has_not_are_refused(demo, tmp_path):
    mixed = replace(narrow("ViT-B-16-SigLIP"), text_pool="end")
    with pytest.raises(UserError, match="SiglipModel is attention with last, its CLIPModel class with end"):
        hf_class(mixed)
    with pytest.raises(UserError, match="an image tower of timm.*--to hf"):
        export_openclip(checkpoint_of(perturbed(narrow("ViT-B-16-SigLIP")), demo), tmp_path / "oc")
    with pytest.raises(UserError, match="the image tower has no projection"):
        replace(narrow("ViT-B-16-SigLIP"), embed_dim=24)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
def test_chunks_and_recomputation_leave_its_gradients_unchanged(checkpointing):
    model = perturbed(narrow("ViT-B-16-SigLIP", context_length=32)).double()
    data = [x.double() if x.is_floating_point() else x for x in inputs(model.config, 7)]
    options = dict(chunk_size=3, checkpointing=checkpointing)
    torch.testing.assert_close(gradients(model, data, **options), gradients(model, data), rtol=1e-11, atol=1e-13)


def test_captions_stay_whole_and_in_order():
    config = narrow("ViT-B-16-SigLIP")
    tokens = inputs(config, 40)[1]
    captions = cut_captions(tokens, config, None, torch.device("cpu"))
    assert len(captions.chunks) == 4 and captions.place is None and torch.equal(torch.cat(captions.chunks), tokens)
    assert captions.valid(config.context_length).all()
    with pytest.raises(UserError, match="takes 64, padded"):
        cut_captions(tokens[:, :40], config, None, torch.device("cpu"))


def test_operations_are_counted():
    config = narrow("ViT-B-16-SigLIP")
    model, n = perturbed(config), 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs(config, n))
    query = 2 * config.vision_width**2  # once for all samples
    assert counter.get_total_flops() == n * sum(forward_flops(config, text_tokens=5)) + query


def test_a_run_with_the_sigmoid_loss_begins_with_the_weights_bias(demo, tmp_path):
    model = perturbed(narrow("ViT-B-16-SigLIP"))
    initial = load_init_once(folder_of(model, demo, tmp_path / "hf"), model.config, Collectives.single())
    assert initial.bias == BIAS and any("begins with it" in note for note in initial.notes)


@pytest.mark.parametrize(
    "scale, most, begins", [(109.9, 100.0, 100), (109.9, 110.0, None), (100.0, 100.0, None), (0.5, 100.0, 1)]
)
def test_a_run_that_can_not_begin_with_the_weights_scale_says_so(scale, most, begins, demo, tmp_path):
    """And what it says it begins with is what the engine's clamp makes of it."""
    model = perturbed(narrow("ViT-B-16-SigLIP"))
    export_hf(replace(checkpoint_of(model, demo), logit_bias=BIAS, logit_scale=scale), tmp_path / "hf")
    initial = load_init_once(tmp_path / "hf", model.config, Collectives.single(), max_logit_scale=most)
    said = [note for note in initial.notes if "logit scale" in note]
    scalars = LossScalars(LossSection(max_logit_scale=most), OptimSection(), 10, torch.device("cpu"), has_bias=True)
    scalars.set_scale(initial.scale)
    if begins is None:
        assert not said and scalars.scale == pytest.approx(scale, rel=1e-6)
    else:
        assert (
            len(said) == 1 and f"begins with {begins}" in said[0] and scalars.scale == pytest.approx(begins, rel=1e-6)
        )
        assert ("set loss.max_logit_scale=110 to keep it" in said[0]) == (scale > most)
