"""The fast decoding path against CLIP's own preprocessing, and augmentation on the device against plain references."""

import colorsys
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dsclip.config.schema import DataSection
from dsclip.convert.hf import hf_preprocessor
from dsclip.data.batch import Batch
from dsclip.data.decoding.augment import IDENTITY, augment, draw_augmentation
from dsclip.data.decoding.fast_image import FastImages
from dsclip.data.decoding.sample import BadSample, RawSample, decode_image
from dsclip.data.decoding.transforms import eval_image, train_image
from dsclip.datasets.scenes import draw, random_scene
from dsclip.model import resolve_preset
from dsclip.train.prefetch import on_device


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG with the spectrum of photographs, 1/f."""
    rng = np.random.default_rng(seed)
    across, down = np.fft.rfftfreq(width)[None, :, None], np.fft.fftfreq(height)[:, None, None]
    waves = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1)) / (np.hypot(across, down) + 2e-3) ** 1.2
    pixels = np.fft.irfft2(waves, s=(height, width), axes=(0, 1))
    pixels = 255 * (pixels - pixels.min()) / (pixels.max() - pixels.min())
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "bound"),
    [(200, 150, 0.3), (224, 224, 0.3), (333, 500, 0.3), (1024, 768, 4.0), (2048, 1536, 4.0)],
)
@pytest.mark.parametrize("crop_scale", [[0.9, 1.0], [0.3, 1.0], [0.08, 0.1]])
def test_fast_pixels_are_close_to_the_exact_ones(width, height, bound, crop_scale):
    """Equal but for rounding where the JPEG is decoded whole; decoded smaller, the crop moves by half a pixel at most."""
    fast, out = FastImages(224, crop_scale, 10**8), torch.empty(3, 224, 224, dtype=torch.uint8)
    differences = []
    for seed in range(3):
        raw = RawSample("a", "b", {"jpg": photograph(width, height, seed)})
        fast(raw, np.random.default_rng(seed), out)
        exact = train_image(decode_image(raw, 10**8), 224, crop_scale, np.random.default_rng(seed))
        differences.append((out.float() - exact.float()).abs().mean().item())
    assert max(differences) < bound


def test_large_pictures_are_decoded_smaller(monkeypatch):
    """As far as the crop allows it: a small crop of a large picture needs all its pixels."""
    sizes = []
    plain = FastImages._decode
    monkeypatch.setattr(FastImages, "_decode", lambda *a: (found := plain(*a), sizes.append(found[0].shape[:2]))[0])
    raw = RawSample("a", "b", {"jpg": photograph(1600, 1200, 0)})
    for crop_scale in ([0.9, 1.0], [0.02, 0.03]):
        FastImages(224, crop_scale, 10**8)(raw, np.random.default_rng(0), torch.empty(3, 224, 224, dtype=torch.uint8))
    assert max(sizes[0]) <= 800 and sizes[1] == (1200, 1600)


def test_broken_jpegs_are_bad_samples():
    whole = photograph(64, 64, 0)
    for content in (whole[:100], whole[: len(whole) // 2], b"\xff\xd8\xff" + bytes(100), whole[:20]):
        with pytest.raises(BadSample, match="undecodable image"):
            FastImages(32, [0.9, 1.0], 10**6)(
                RawSample("a", "b", {"jpg": content}),
                np.random.default_rng(0),
                torch.empty(3, 32, 32, dtype=torch.uint8),
            )


def transparent(mode: str, kind: str) -> bytes:
    """Two thirds of it in three steps of transparency, above colours that are not to be seen."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 60, 4), dtype=np.uint8)
    pixels[..., 3] = np.repeat([0, 128, 255], 20)
    image = Image.fromarray(pixels).convert(mode)
    if mode == "P":
        image.info["transparency"] = 0
    stream = io.BytesIO()
    image.save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


@pytest.mark.parametrize("mode, kind", [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "WEBP")])
def test_transparent_pictures_lie_on_white_in_training_evaluation_and_the_exported_processor(mode, kind):
    content = transparent(mode, kind)
    raw = RawSample("a", "b", {kind.lower(): content})
    processor = CLIPImageProcessorPil(**hf_preprocessor(resolve_preset("demo", image_size=32, patch_size=16)))
    theirs = processor(Image.open(io.BytesIO(content)), do_normalize=False, do_rescale=False, return_tensors="pt")
    evaluated = eval_image(decode_image(raw, 10**6), 32)
    assert torch.equal(evaluated, theirs["pixel_values"][0].to(torch.uint8))

    whole, crop = Image.open(io.BytesIO(content)).convert("RGBA"), torch.empty(3, 32, 32, dtype=torch.uint8)
    white = Image.composite(whole, Image.new("RGBA", whole.size, "white"), whole.getchannel("A")).convert("RGB")
    FastImages(32, [0.9, 1.0], 10**6)(raw, np.random.default_rng(0), crop)
    exact = train_image(white, 32, [0.9, 1.0], np.random.default_rng(0))
    assert (crop.float() - exact.float()).abs().mean() < 1


def pictures(count: int) -> torch.Tensor:
    scenes = [np.array(draw(random_scene(np.random.default_rng(i), held_out=False, two_objects=True), 32,
                            np.random.default_rng(i))) for i in range(count)]  # fmt: skip
    return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).contiguous()


def numbers(**changes) -> torch.Tensor:
    names = ("flip", "brightness", "contrast", "saturation", "hue", "grey")
    return torch.tensor([[changes.get(name, value) for name, value in zip(names, IDENTITY, strict=True)]] * 4)


def test_nothing_to_change_leaves_every_bit():
    images = pictures(4)
    assert torch.equal(augment(images, numbers()), images)
    assert torch.equal(augment(images, numbers(flip=1.0)), images.flip(3))


@pytest.mark.parametrize(
    ("name", "enhance"),
    [("brightness", ImageEnhance.Brightness), ("contrast", ImageEnhance.Contrast), ("saturation", ImageEnhance.Color)],
)
@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_colour_jitter_is_pillows(name, enhance, factor):
    images = pictures(4)
    ours = augment(images, numbers(**{name: factor}))
    for mine, image in zip(ours, images, strict=True):
        pillow = enhance(Image.fromarray(image.permute(1, 2, 0).numpy())).enhance(factor)
        assert np.abs(mine.permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow).astype(int)).max() <= 2


@settings(max_examples=40, deadline=None)
@given(turn=st.floats(-0.5, 0.5), colours=st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=4, max_size=4))
def test_hues_turn_as_in_colorsys(turn, colours):
    images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2).contiguous()
    ours = augment(images, numbers(hue=turn))[:, :, 0, 0].tolist()
    for found, colour in zip(ours, colours, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
        wanted = [255 * c for c in colorsys.hsv_to_rgb((h + turn) % 1, s, v)]
        assert np.abs(np.array(found) - wanted).max() <= 1.01


def test_grey_pictures_have_equal_channels():
    grey = augment(pictures(4), numbers(grey=1.0))
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 1], grey[:, 2])


def test_drawn_numbers_follow_the_recipe():
    assert draw_augmentation(DataSection(), np.random.default_rng(0)) is None
    data = DataSection(flip=True, color_jitter=[0.4, 0.3, 0.2, 0.1], color_jitter_probability=0.5, grayscale=0.2)
    drawn = np.array([draw_augmentation(data, np.random.default_rng(i)) for i in range(2000)])
    assert drawn[:, 0].mean() == pytest.approx(0.5, abs=0.05) and drawn[:, 5].mean() == pytest.approx(0.2, abs=0.04)
    changed = drawn[(drawn[:, 1:5] != IDENTITY[1:5]).any(1)]
    assert len(changed) / 2000 == pytest.approx(0.5, abs=0.05)
    for column, spread in ((1, 0.4), (2, 0.3), (3, 0.2)):
        assert 1 - spread <= changed[:, column].min() < 1 - 0.9 * spread and changed[:, column].max() > 1 + 0.9 * spread
    assert np.abs(changed[:, 4]).max() <= 0.1


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
def test_batches_arrive_on_the_device_in_order_and_augmented(device):
    images = pictures(4)
    given = [
        Batch(images + i, torch.tensor([i]), torch.arange(4), augmentation=numbers(flip=1.0), state={"batches": i})
        for i in range(5)
    ]
    taken = list(zip(range(4), on_device(iter(given), torch.device(device)), strict=False))
    for i, batch in taken:
        assert batch.state == {"batches": i} and batch.tokens.tolist() == [i] and batch.images.device.type == device
        assert torch.equal(batch.images.cpu(), (images + i).flip(3)) and batch.augmentation is None


def test_jpegs_that_only_pillow_reads_are_used_and_counted():
    """Stray bytes between segments, as cameras and scrapers leave them: libjpeg-turbo's strict interface refuses the file."""
    whole = photograph(96, 64, 0)
    strays = [whole[:-2] + b"\x12\x34\x56" * 5 + whole[-2:], whole.replace(b"\xff\xda", b"\x01\x02\xff\xda", 1)]
    fast, out, expected = FastImages(32, [0.5, 1.0], 10**6), *torch.empty(2, 3, 32, 32, dtype=torch.uint8)
    fast(RawSample("a", "b", {"jpg": whole}), np.random.default_rng(1), expected)
    assert fast.slow_decoded == 0
    for content in strays:
        fast(RawSample("a", "b", {"jpg": content}), np.random.default_rng(1), out)
        assert (out.float() - expected.float()).abs().mean() < 4
    assert fast.slow_decoded == 2
