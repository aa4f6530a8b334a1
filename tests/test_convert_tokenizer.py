"""The tokenizer of a converted model: it knows how many tokens the model takes, and is the source's, byte for byte."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from tokenizers import Tokenizer as Backend
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, pipeline

from dsclip.convert import cli, export_hf
from dsclip.convert.dsclip_export import export_dsclip
from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.source import open_source
from dsclip.convert.whole import whole_model
from tests.test_convert import checkpoint_of, perturbed, small
from tests.test_model_siglip import folder_of, narrow

EXPORTS = {"hf": export_hf, "openclip": export_openclip, "dsclip": export_dsclip}
LONG = "a red star " * 200


@pytest.fixture(scope="module")
def model():
    return perturbed(small("demo"))


def tokenizer_in(folder):
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def test_long_captions_are_cut_to_the_model(model, demo, tmp_path):
    for to, export in EXPORTS.items():
        export(checkpoint_of(model, demo), tmp_path / to)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_in(tmp_path / to))
        assert tokenizer.model_max_length == model.config.context_length
        tokens = tokenizer(LONG, truncation=True)["input_ids"]
        assert len(tokens) == model.config.context_length and tokens[-1] == model.config.eot_token_id
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    inputs = processor(text=[LONG, "blue ring"], padding=True, truncation=True, return_tensors="pt")
    features = CLIPModel.from_pretrained(tmp_path / "hf").eval().text_model(**inputs).pooler_output
    assert features.shape == (2, model.config.text_width) and features.isfinite().all()


@pytest.mark.parametrize("length", [None, 16, 32])
@pytest.mark.parametrize("ways", ["hf dsclip", "hf dsclip hf", "hf openclip", "openclip hf", "dsclip openclip dsclip"])
def test_conversion_leaves_the_tokenizer_as_it_was(ways, length, model, demo, tmp_path):
    """Truncation and padding are part of tokenizer.json, and tokenizing changes them."""
    first, *others = ways.split()
    EXPORTS[first](checkpoint_of(model, demo), tmp_path / "0")
    file = tokenizer_in(tmp_path / "0") / "tokenizer.json"
    backend = Backend.from_file(str(file))
    backend.no_truncation() if length is None else backend.enable_truncation(length)
    backend.no_padding() if length is None else backend.enable_padding(
        length=length, pad_id=611, pad_token="<|endoftext|>"
    )
    backend.save(str(file))
    if first == "dsclip":  # its manifest knows the file that was there
        export_dsclip(replace(checkpoint_of(model, demo), tokenizer_dir=file.parent), tmp_path / "source")
        (tmp_path / "0").rename(tmp_path / "unused")
        (tmp_path / "source").rename(tmp_path / "0")
    written = (tokenizer_in(tmp_path / "0") / "tokenizer.json").read_bytes()
    for i, to in enumerate(others):
        read = whole_model(open_source(tmp_path / str(i)), tmp_path / f"{i}-tokenizer")
        EXPORTS[to](read, tmp_path / str(i + 1))
        assert (tokenizer_in(tmp_path / str(i + 1)) / "tokenizer.json").read_bytes() == written


@pytest.mark.parametrize("context", [16, 64])
def test_next_names_no_command_that_fails(context, demo, tmp_path, capsys):
    """The pipeline pads every SiglipModel's labels to 64 tokens itself."""
    folder_of(perturbed(narrow("ViT-B-16-SigLIP", context_length=context)), demo, tmp_path / "in")
    with pytest.raises(SystemExit):
        cli.main([str(tmp_path / "in"), str(tmp_path / "out")], to="hf")
    assert ("pipeline(" in capsys.readouterr().out) == (context == 64)
    classify = pipeline("zero-shot-image-classification", str(tmp_path / "out"))
    if context == 64:
        classify(Image.new("RGB", (40, 40)), candidate_labels=["red star"])
    else:
        with pytest.raises(ValueError, match="[Ss]equence length"):
            classify(Image.new("RGB", (40, 40)), candidate_labels=["red star"])
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["model_max_length"] == context
