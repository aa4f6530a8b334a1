"""One tool, every direction: dsclip -> HuggingFace or OpenCLIP -> dsclip gives every bit back, and what can't be is refused."""

import json
from dataclasses import replace

import pytest
import torch

from dsclip.checkpoint import read_checkpoint
from dsclip.convert import cli, export_hf
from dsclip.convert.compare import check_read_back, difference_in_transformers
from dsclip.convert.dsclip_export import export_dsclip
from dsclip.convert.openclip_export import export_openclip
from dsclip.convert.source import open_source
from dsclip.convert.whole import whole_model
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.evaluate.cli import _parser, evaluate
from dsclip.model.presets import PRESETS, VARIANTS, resolve_preset
from dsclip.train.run_folder import find_resume
from tests.test_convert import checkpoint_of, openclip_weights, perturbed, small

FP32 = torch.float32
BIAS = -9.5
EXPORTS = {"hf": export_hf, "openclip": export_openclip}


def narrow(preset):
    """The preset's towers, two blocks deep, with its heads and proportions and a small width."""
    c = resolve_preset(preset)
    vision, text = 4 * c.vision_heads, 4 * c.text_heads
    return replace(
        c, vision_layers=2, text_layers=2, vision_width=vision, text_width=text, embed_dim=24, vocab_size=612, eot_token_id=611,
        vision_mlp_width=vision * c.vision_mlp_width // c.vision_width, text_mlp_width=4 * text, image_size=2 * c.patch_size,
    )  # fmt: skip


def converted(source, out, tokenizer_folder):
    """A folder's model, written as a dsclip checkpoint."""
    model = whole_model(open_source(source), tokenizer_folder)
    export_dsclip(model, out)
    check_read_back(model, out, FP32)
    return read_checkpoint(out)


@pytest.mark.parametrize("preset", PRESETS | VARIANTS)
def test_every_presets_weights_come_back_bit_for_bit(preset, demo, tmp_path):
    checkpoint = checkpoint_of(perturbed(narrow(preset)), demo)
    for name, export in EXPORTS.items():
        bias = BIAS if name == "openclip" else None
        export(replace(checkpoint, logit_bias=bias), tmp_path / name)
        back = converted(tmp_path / name, tmp_path / f"{name}-back", tmp_path / f"{name}-tokenizer")
        assert back.config == checkpoint.config and back.logit_bias == bias
        assert back.state_dict.keys() == checkpoint.state_dict.keys()
        assert all(torch.equal(back.state_dict[n], p) for n, p in checkpoint.state_dict.items())
        assert torch.tensor([back.logit_scale]).log() == torch.tensor([checkpoint.logit_scale]).log()


@pytest.fixture(scope="module")
def model():
    return perturbed(small("demo", activation="quick_gelu", vision_heads=2, image_std=[0.25] * 3))


@pytest.fixture
def folder(model, demo, tmp_path):
    export_hf(checkpoint_of(model, demo), tmp_path / "hf", dtype="fp32")
    return tmp_path / "hf"


def run(capsys, *arguments, code=0, to=None):
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments), "--json"], to=to)
    assert ended.value.code == code
    return json.loads(capsys.readouterr().out)


def test_the_tool_goes_round_all_formats(model, folder, tmp_path, capsys):
    """hf -> dsclip -> openclip -> hf -> openclip -> dsclip."""
    ways = [("dsclip", "1"), ("openclip", "2"), ("hf", "3"), ("openclip", "4"), ("dsclip", "5")]
    source = folder
    for to, out in ways:
        result = run(capsys, source, tmp_path / out, "--to", to)
        assert result["to"] == to and result["checkpoint"].startswith(str(source))
        assert (result["max_difference"] or 0) <= 1e-5
        source = tmp_path / out
    assert run(capsys, tmp_path / "1", tmp_path / "6", to="hf")["max_difference"] <= 1e-5
    for out in ("1", "5"):
        created = create_model("demo", init=str(tmp_path / out), vision_layers=2, text_layers=2, vocab_size=612)
        assert created.config == model.config
        assert all(torch.equal(created.state_dict()[n], p) for n, p in model.state_dict().items())
    card = (tmp_path / "6" / "README.md").read_text()
    assert "the weights of `1`, and how they were trained isn't known" in card and "0 steps" not in card
    options = ["--task", "zeroshot", "--data", "demo:val", "--max-samples", "8", "--dtype", "fp32"]
    metrics = [
        evaluate(_parser().parse_args(["--model", str(path), *options]))["metrics"] for path in (folder, tmp_path / "5")
    ]
    assert metrics[0] == metrics[1]


def test_the_comparison_sees_a_misread_folder(folder, tmp_path):
    """transformers computes from the folder, dsclip from what it read there."""
    read = whole_model(open_source(folder), tmp_path / "tokenizer")
    assert difference_in_transformers(read, folder) <= 1e-5
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for tower in ("text_config", "vision_config"):
        config[tower]["hidden_act"] = "gelu"
    path.write_text(json.dumps(config))
    assert difference_in_transformers(read, folder) > 1e-4


def test_weights_alone_are_no_run_to_continue(folder, tmp_path, capsys):
    run(capsys, folder, tmp_path / "out", "--to", "dsclip")
    with pytest.raises(UserError, match="holds weights alone.*model.init="):
        find_resume(str(tmp_path / "out"), tmp_path / "run")
    file = tmp_path / "out" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="weights.safetensors has changed since it was written"):
        open_source(tmp_path / "out")


def test_a_bare_state_dict_needs_a_tokenizer(demo, tmp_path, capsys):
    torch.save(openclip_weights(perturbed(small("demo", vision_heads=2, text_heads=2))), tmp_path / "a.pt")
    error = run(capsys, tmp_path / "a.pt", tmp_path / "out", "--to", "dsclip", code=2)["error"]
    assert "no tokenizer with it" in error and not (tmp_path / "out").exists()
    run(capsys, tmp_path / "a.pt", tmp_path / "out", "--to", "dsclip", "--tokenizer", "demo")
    assert read_checkpoint(tmp_path / "out").config.eot_token_id == 611


def test_weights_that_do_not_fit_leave_no_folder(model, demo, tmp_path):
    checkpoint = checkpoint_of(model, demo)
    del checkpoint.state_dict["text.head.ln_final.bias"]
    for export in (*EXPORTS.values(), export_dsclip):
        with pytest.raises(UserError, match="the weights lack text.head.ln_final.bias"):
            export(checkpoint, tmp_path / "out")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--to", "dsclip", "--dtype", "bf16"], "holds float32"),
        (["--to", "dsclip", "--max-shard-gb", "1"], "--max-shard-gb belongs to --to hf"),
        (["--to", "openclip", "--without-bias"], "--without-bias belongs to --to hf"),
    ],
)
def test_options_of_another_format_are_refused(options, message, folder, tmp_path, capsys):
    assert message in run(capsys, folder, tmp_path / "out", *options, code=2)["error"]
