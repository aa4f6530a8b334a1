"""Models of other frameworks: three functions give what the model's own loader gives, and wrong ones are a sentence."""

import pytest
import torch
import torch.distributed as dist

from dsclip.convert import export_hf
from dsclip.errors import UserError
from dsclip.evaluate.adapter import load_adapter
from dsclip.evaluate.cli import ON_GPUS, _parser, evaluate
from tests.test_convert import checkpoint_of, perturbed, small

TRANSFORMERS = """
import torch
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

def model():
    clip = CLIPModel.from_pretrained({folder!r}).eval()
    processor, tokenizer = (c.from_pretrained({folder!r}) for c in (CLIPImageProcessorPil, AutoTokenizer))

    def preprocess(image):
        return processor(image, return_tensors="pt")["pixel_values"][0]

    def encode_image(batch):
        return clip.get_image_features(pixel_values=batch).pooler_output

    def encode_text(texts):
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        return clip.get_text_features(**tokens).pooler_output

    return preprocess, encode_image, encode_text
"""


def run(*arguments):
    return evaluate(_parser().parse_args([*map(str, arguments), "--batch-size", "16", "--max-samples", "40"]))


@pytest.mark.parametrize("task", ["retrieval", "zeroshot"])
def test_transformers_through_an_adapter_scores_as_the_folder_does(demo, tmp_path, task):
    export_hf(checkpoint_of(perturbed(small("demo")), demo), tmp_path / "hf")
    (tmp_path / "theirs.py").write_text(TRANSFORMERS.format(folder=str(tmp_path / "hf")))
    own = run("--model", tmp_path / "hf", "--task", task, "--data", "demo:val")
    theirs = run("--model", f"adapter:{tmp_path}/theirs.py:model", "--task", task, "--data", "demo:val")
    measured = {name: value for name, value in own["metrics"].items() if not name.startswith("calibration")}
    assert theirs["metrics"] == measured, "an adapter's model has no logit scale"
    assert (
        theirs["protocol"]["model"]["weights_sha256"] is None
        and len(theirs["protocol"]["image"]["adapter_sha256"]) == 64
    )


@pytest.mark.parametrize(
    ("spec", "code", "message"),
    [
        ("adapter:model", "", "write adapter:MODULE:FUNCTION"),
        ("adapter:no_such_module_here:f", "", "there is no module no_such_module_here"),
        ("adapter:{file}:other", "def model(): pass", "has no function other"),
        ("adapter:{file}:model", "def model(): return 1, 2", "must return three functions: preprocess"),
        ("adapter:{file}x.py:model", "", "there is no file"),
    ],
)
def test_what_is_no_adapter_is_a_sentence(tmp_path, spec, code, message):
    (tmp_path / "a.py").write_text(code)
    with pytest.raises(UserError, match=message):
        load_adapter(spec.format(file=tmp_path / "a.py"))


def test_features_of_another_shape_and_options_an_adapter_cannot_obey_are_refused(demo, tmp_path):
    code = (
        "import torch\ndef model():\n"
        "    return (lambda image: torch.zeros(3)), (lambda batch: batch[0]), (lambda texts: torch.ones(len(texts), 3))\n"
    )
    (tmp_path / "a.py").write_text(code)
    spec = f"adapter:{tmp_path}/a.py:model"
    with pytest.raises(
        UserError, match=r"encode_image returned \[3\] for 16 inputs, and must return features \[16, d\]"
    ):
        run("--model", spec, "--task", "zeroshot", "--data", "demo:val")
    with pytest.raises(UserError, match="--dtype can't be obeyed with an adapter"):
        run("--model", spec, "--task", "zeroshot", "--data", "demo:val", "--dtype", "bf16")


def test_features_of_two_widths_can_not_be_compared(demo, tmp_path):
    (tmp_path / "wide.py").write_text(
        "import torch\n"
        "def model():\n"
        "    return (lambda image: torch.zeros(3), lambda batch: torch.ones(len(batch), 9), lambda texts: torch.ones(len(texts), 8))\n"
    )
    with pytest.raises(UserError, match="image features have 9 numbers and its text features 8"):
        run("--model", f"adapter:{tmp_path}/wide.py:model", "--task", "retrieval", "--data", "demo:val")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpus_features_are_gathered_from_either_memory(tmp_path):
    dist.init_process_group(ON_GPUS, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for device in ("cpu", "cuda"):
            whole = torch.empty(3, device=device)
            dist.all_gather_into_tensor(whole, torch.arange(3.0, device=device))
            assert whole.tolist() == [0, 1, 2]
    finally:
        dist.destroy_process_group()
