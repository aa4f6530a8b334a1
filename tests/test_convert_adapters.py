"""What a run with adapters leaves, seen by everyone else: one plain model, for transformers, for a new run, for evaluation."""

import pytest
import torch
from transformers import CLIPModel

from dsclip.bench.step import make_batch
from dsclip.checkpoint import CheckpointStore, read_checkpoint
from dsclip.config import load_ds_config
from dsclip.config.schema import BatchSection, ModelSection, OptimSection, Recipe, TrainSection
from dsclip.convert import export_hf, load_init
from dsclip.convert.source import open_source
from dsclip.data import load_tokenizer
from dsclip.engine.consolidate import full_precision_weights
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.model import Clip, resolve_preset
from tests.distributed.launch import alone

LORA = dict(lora_rank=4, lora_alpha=8.0, lora_targets=["blocks", "head.projection"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo):
    """(its checkpoint, images, tokens, features): a model whose adapters went three large steps in float32."""
    folder, tokenizer = tmp_path_factory.mktemp("lora"), load_tokenizer("demo")
    config = resolve_preset("demo", vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id)
    section = ModelSection(preset="demo", init="weights", **LORA)
    recipe = Recipe(
        model=section,
        batch=BatchSection(16),
        optim=OptimSection(lr=1e-2, warmup_steps=0),
        train=TrainSection(steps=3, compile="off"),
    )
    settings = load_ds_config("ds_configs/zero1_bf16.json", recipe, 1)
    settings["bf16"] = {"enabled": False}
    with alone():
        engine = ContrastiveEngine(recipe, settings, config)
        for step in range(3):
            engine.train_step(make_batch(config, 16, step))
        batch = make_batch(config, 16, 3)
        features = engine.encode_image(batch.images), engine.encode_text(batch.tokens)
        store = CheckpointStore(folder, keep=1, tokenizer=tokenizer)
        path = store.save(engine, {}, {"model": vars(section), "train": {"name": "lora"}})
        engine.close()
    return path, batch.images, batch.tokens, features


def test_the_exported_model_equals_the_one_with_adapters(trained, tmp_path):
    path, images, tokens, (image, text) = trained
    checkpoint = read_checkpoint(path)
    name = "visual.blocks.0.attn.qkv.weight"
    assert (checkpoint.state_dict[name] - full_precision_weights(path)[name]).abs().max() > 1e-3, "something was merged"
    export_hf(checkpoint, tmp_path / "hf", metrics={}, data={})
    model = CLIPModel.from_pretrained(tmp_path / "hf").eval()
    pixels = (images.float() / 255 - torch.tensor(checkpoint.config.image_mean)[:, None, None]) / torch.tensor(
        checkpoint.config.image_std
    )[:, None, None]
    with torch.no_grad():
        found = model(input_ids=tokens, pixel_values=pixels)
    torch.testing.assert_close(found.image_embeds, image, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.text_embeds, text, rtol=0, atol=1e-6)


def test_a_new_run_and_evaluation_begin_with_the_merged_model(trained):
    path, images, tokens, features = trained
    source = open_source(path)
    assert source.said["vision_width"] == 128
    model = Clip(read_checkpoint(path).config)
    weights, _ = load_init(path, model.config)
    plain = set(model.state_dict())
    assert set(weights) == plain == {name for name, _ in source.weights()}
    model.load_state_dict(weights)
    with torch.no_grad():
        for ours, theirs in zip(model(images, tokens), features, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            assert ours.std() > 0
