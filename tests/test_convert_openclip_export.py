"""OpenCLIP folders: written a tensor at a time, read back bit for bit, and the same features in OpenCLIP where it is installed."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dsclip.convert.compare import check_read_back, difference_in_openclip
from dsclip.convert.openclip import fields_shown
from dsclip.convert.openclip_export import export_openclip, openclip_config
from dsclip.convert.probe import probe_inputs
from dsclip.convert.safetensors_file import write_one_file
from dsclip.convert.source import HIDDEN, open_source
from dsclip.convert.weights import from_openclip, to_openclip
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model import Clip, ClipConfig
from dsclip.model.openclip_config import read_openclip_config
from dsclip.model.presets import PRESETS, VARIANTS, resolve_preset
from tests.test_convert import SCALE, checkpoint_of, openclip_weights, perturbed, small
from tests.test_convert_openclip import SHAPES, UNUSUAL

OPTIONS = dict(vision_layer_scale=0.1, text_layer_scale=0.2, vision_qk_norm=True, text_qk_norm=True)
CASES = {
    "demo": {},
    "odd": UNUSUAL,
    "options": OPTIONS | UNUSUAL,
    "layer scale": dict(text_layer_scale=0.2),
    "average": dict(vision_pool="average", vision_registers=1),
}


def exported(case, demo, out, **options):
    model = perturbed(small("demo", **CASES[case]))
    checkpoint = replace(checkpoint_of(model, demo), logit_bias=-9.5 if case == "odd" else None)
    export_openclip(checkpoint, out, **options)
    return checkpoint


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_identical(case, demo, tmp_path):
    checkpoint = exported(case, demo, tmp_path / "oc")
    source = open_source(tmp_path / "oc")
    assert source.config() == replace(checkpoint.config, patch_dropout=0.0)
    read = dict(source.weights())
    assert read.keys() == checkpoint.state_dict.keys()
    assert all(torch.equal(read[n], p) for n, p in checkpoint.state_dict.items())
    assert source.scale == pytest.approx(SCALE) and source.logit_bias == (-9.5 if case == "odd" else None)
    check_read_back(checkpoint, tmp_path / "oc", torch.float32)


@pytest.mark.parametrize("preset", PRESETS | VARIANTS)
def test_every_presets_configuration_reads_back(preset, tmp_path):
    """Also heads of 80, 88 and 104, and the MLPs of g and bigG, whose ratio to the width is no short number."""
    config = resolve_preset(preset)
    content = openclip_config(config, None, "tokenizer")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    said, preprocessing = read_openclip_config(tmp_path / "open_clip_config.json")
    assert ClipConfig(**said) == config and preprocessing is None
    with torch.device("meta"):
        named = {n: p.shape for n, p in to_openclip(Clip(config).state_dict().items(), 1.0, None)}
    assert fields_shown(
        from_openclip({n: torch.empty(shape, device="meta") for n, shape in named.items() if n != "logit_scale"})[0]
    ) == {name: said[name] for name in said.keys() - set(HIDDEN)}


def test_names_and_layouts_are_openclips(demo, tmp_path):
    """Against the table that was written by hand."""
    checkpoint = exported("odd", demo, tmp_path / "oc")
    stored = load_file(tmp_path / "oc" / "open_clip_model.safetensors")
    expected = openclip_weights(perturbed(checkpoint.config)) | {"logit_bias": torch.tensor(-9.5)}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[n], p) for n, p in expected.items())
    config = json.loads((tmp_path / "oc" / "open_clip_config.json").read_text())
    text, vision = config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
    assert config["model_cfg"]["quick_gelu"] and config["model_cfg"]["init_logit_bias"] == -9.5
    assert (text["pool_type"], text["eos_id"], text["norm_kwargs"], vision["head_width"]) == (
        "eos",
        611,
        {"eps": 1e-3},
        64,
    )
    assert config["preprocess_cfg"]["std"] == [0.25] * 3 and (tmp_path / "oc" / "tokenizer.json").is_file()


def test_the_sigmoid_bias_is_said_to_be_left_out_on_the_way_back(demo, tmp_path):
    exported("odd", demo, tmp_path / "oc")
    with pytest.warns(UserWarning, match="the bias of a sigmoid loss, -9.5: .*leaves it out"):
        create_model("demo", init=str(tmp_path / "oc"), **SHAPES)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_keeps_the_scale_in_float32(dtype, demo, tmp_path):
    checkpoint = exported("demo", demo, tmp_path / "oc", dtype=dtype)
    stored = load_file(tmp_path / "oc" / "open_clip_model.safetensors")
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    assert {n: x.dtype for n, x in stored.items()} == {n: dtypes[dtype] for n in stored} | {
        "logit_scale": torch.float32
    }
    check_read_back(checkpoint, tmp_path / "oc", dtypes[dtype])


def test_a_folder_that_reads_back_otherwise_is_not_to_be_used(demo, tmp_path):
    checkpoint = exported("demo", demo, tmp_path / "oc")
    with pytest.raises(UserError, match="text.head.ln_final.bias reads back otherwise"):
        checkpoint.state_dict["text.head.ln_final.bias"][3] += 1
        check_read_back(checkpoint, tmp_path / "oc", torch.float32)
    with pytest.raises(UserError, match="its configuration reads back as"):
        check_read_back(
            replace(checkpoint, config=replace(checkpoint.config, activation="quick_gelu")),
            tmp_path / "oc",
            torch.float32,
        )
    with pytest.raises(UserError, match="exists already"):
        export_openclip(checkpoint, tmp_path / "oc")


def test_a_model_without_class_token_is_refused(demo, tmp_path):
    checkpoint = checkpoint_of(perturbed(small("demo", vision_pool="average")), demo)
    with pytest.raises(UserError, match="OpenCLIP's image towers always have one"):
        export_openclip(checkpoint, tmp_path / "oc")


def test_registers_are_refused(demo, tmp_path):
    for pool, registers in (("class", 1), ("average", 2)):
        checkpoint = checkpoint_of(perturbed(small("demo", vision_pool=pool, vision_registers=registers)), demo)
        with pytest.raises(UserError, match="OpenCLIP's image towers have no registers"):
            export_openclip(checkpoint, tmp_path / "oc")


def test_broken_weights_leave_no_folder(demo, tmp_path):
    model = perturbed(small("demo"))
    checkpoint = checkpoint_of(model, demo)
    checkpoint.state_dict["text.head.ln_final.bias"][3] = torch.nan
    with pytest.raises(UserError, match="text.head.ln_final.bias are not finite"):
        export_openclip(checkpoint, tmp_path / "oc")
    assert not (tmp_path / "oc").exists()


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """The one before last is gone when the next is asked for."""
    alive = []

    def weights():
        for i in range(5):
            assert sum(x() is not None for x in alive) <= 1
            tensor = torch.full((1000,), float(i))
            alive.append(weakref.ref(tensor))
            yield str(i), tensor
            del tensor

    write_one_file(
        tmp_path / "a.safetensors", [(str(i), torch.Size([1000]), torch.float32) for i in range(5)], weights()
    )
    assert [x[0].item() for x in load_file(tmp_path / "a.safetensors").values()] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"1 \[2\] torch.float32 came, which wasn't said to"):
        shapes = [("0", torch.Size([2]), torch.float32)]
        write_one_file(tmp_path / "b.safetensors", shapes, [("1", torch.zeros(2))])


def test_names_of_other_models_are_not_written():
    with pytest.raises(ValueError, match="no weight of a CLIP tower"):
        list(to_openclip([("text.other", torch.ones(1))], 1.0, None))


@pytest.mark.parametrize("case", CASES)
def test_openclip_computes_the_same(case, demo, tmp_path):
    pytest.importorskip("open_clip")
    assert difference_in_openclip(exported(case, demo, tmp_path / "oc"), tmp_path / "oc") <= 1e-6


@pytest.mark.parametrize(
    "vision, text",
    [
        ({"ls_init_value": 0.1}, {"qk_norm": True}),
        ({"qk_norm": True}, {"ls_init_value": 0.3}),
        ({"pool_type": "avg"}, {}),
        ({"pool_type": "avg", "qk_norm": True, "ls_init_value": 0.1, "norm_kwargs": {"eps": 1e-3}}, {"norm_kwargs": {"eps": 1e-3}}),
    ],
)  # fmt: skip
def test_openclips_own_models_compute_the_same_here(vision, text, tmp_path):
    """Random weights of OpenCLIP's classes, every one moved from where it began."""
    open_clip = pytest.importorskip("open_clip")
    content = openclip_config(small("demo"), None, "tokenizer")
    content["model_cfg"]["vision_cfg"] |= vision
    content["model_cfg"]["text_cfg"] |= text
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**content["model_cfg"]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        ours = create_model("auto", init=str(tmp_path))
        images, tokens = probe_inputs(ours.config, ours.config.vocab_size, 3)
        image, caption = ours(images, tokens)
        assert (image - theirs.encode_image(images, normalize=True)).abs().max() <= 1e-6
        assert (caption - theirs.encode_text(tokens, normalize=True)).abs().max() <= 1e-6
