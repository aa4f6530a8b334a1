"""From files to features: dsclip's evaluation computes of photographs and captions what transformers does, each with its own reading.

The photographs are `shared/data/photos.zip` beside the checkout, where that is there, and drawn ones otherwise.
"""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from dsclip.convert import export_hf
from dsclip.data import build_eval_dataset
from dsclip.distributed import Collectives
from dsclip.evaluate.opened import Wanted, open_model
from tests.test_convert import checkpoint_of, perturbed, small
from tests.test_data_decoding_images import photograph
from tests.test_model_siglip import narrow

CHECKOUT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = [p for up in CHECKOUT.parents if (p := up / "shared" / "data" / "photos.zip").is_file()]
COUNT = int(os.environ.get("DSCLIP_TEST_PHOTOGRAPHS", 30))
WORDS = (
    "a red ring and two blue stars above the green square left of one small yellow cross in large white circles".split()
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A set of photographs with five captions each, as people have it."""
    if PHOTOGRAPHS:
        return str(PHOTOGRAPHS[0])
    folder = tmp_path_factory.mktemp("photographs")
    rows = ["filepath\tcaption"]
    for i in range(COUNT):
        (folder / f"{i}.jpg").write_bytes(photograph(60 + 17 * (i % 9), 250 - 19 * (i % 8), i))
        rows += [f"{i}.jpg\t{' '.join((2 * WORDS)[i % 3 : 4 + 7 * k])}" for k in range(1, 6)]
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    return str(folder)


# Of the demo's towers or SigLIP's: activation, side of an image, tokens of a caption, and transformers' rule for the token that is pooled.
CASES = {
    "gelu": ("demo", "gelu", 64, 32, "first end token"),
    "quick_gelu, larger images": ("demo", "quick_gelu", 224, 77, "first end token"),
    "largest id, short captions": ("demo", "gelu", 96, 12, "largest id"),
    "quick_gelu, largest id": ("demo", "quick_gelu", 64, 77, "largest id"),
    "siglip": ("ViT-B-16-SigLIP", "gelu_tanh", 64, 64, "last token"),
    "siglip, short captions": ("ViT-B-16-SigLIP", "gelu_tanh", 112, 12, "last token"),
}


def model_of(preset, activation, size, context):
    options = dict(activation=activation, context_length=context)
    c = small(preset, **options, image_size=size) if preset == "demo" else narrow(preset, **options)
    return perturbed(replace(c, image_size=size))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_photographs_and_captions_have_the_features_that_transformers_computes(case, place, demo, tmp_path):
    preset, activation, size, context, rule = CASES[case]
    folder = tmp_path / "hf"
    bias = dict(logit_bias=-12.5) if rule == "last token" else {}
    export_hf(replace(checkpoint_of(model_of(preset, activation, size, context), demo), **bias), folder)
    if rule == "largest id":
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["eos_token_id"] = 2
        (folder / "config.json").write_text(json.dumps(config))

    ours = open_model(
        Wanted(str(folder), batch_size=32, dtype="fp32"), torch.device("cpu"), Collectives.single(), tmp_path
    )
    dataset = build_eval_dataset(place, image_size=ours.image_size, max_samples=COUNT)
    captions = [caption for of_image in dataset.captions for caption in of_image]
    image, kept = ours.embedder.images(dataset, list(range(len(dataset))))
    assert len(kept) == min(COUNT, len(dataset)) and len(captions) == 5 * len(kept)

    theirs, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(dataset.file(i))) for i in kept]
    batch = processor(text=captions, images=pictures, padding="max_length", truncation=True, return_tensors="pt")
    lengths = (ours.embedder.tokenize(captions, 500) == 611).int().argmax(dim=1) + 1
    assert (lengths > context).any() if context < 60 else (lengths < context).any(), "cut, or padded"
    output = theirs(**batch)
    assert theirs.config.text_config.eos_token_id == (2 if rule == "largest id" else 611)
    assert (image - output.image_embeds).abs().max() <= 1e-5
    assert (ours.embedder.texts(captions) - output.text_embeds).abs().max() <= 1e-5
