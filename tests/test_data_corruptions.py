"""Corruptions: the same for everyone, nothing at severity 0, worse with severity, and what their definitions say."""

import colorsys
import io
import math

import numpy as np
import pytest
from PIL import Image

from dsclip.data.corruptions import blurs, pixels
from dsclip.data.corruptions.corruption import CORRUPTIONS, EXTRA, SIZE, Corruption, parse_corruptions
from dsclip.data.corruptions.pixels import to_pixels
from dsclip.data.decoding.transforms import eval_image, to_uint8
from dsclip.errors import UserError

# Their five severities are five kinds rather than five strengths: less and more colour, coarse and fine warps.
NOT_IN_ORDER = ("saturate", "elastic_transform")


def picture(width=300, height=260, seed=0):
    """Smooth colours with edges and some texture, as photographs have."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:height, :width]
    x = np.stack([column / width, row / height, np.sin(row / 9) * np.cos(column / 7) / 2 + 0.5], axis=-1)
    x[60:150, 80:200] = (0.8, 0.3, 0.1)
    return Image.fromarray((255 * (0.9 * x + 0.1 * rng.random(x.shape))).astype(np.uint8))


def test_severity_0_is_clips_own_resize_and_crop():
    for name in CORRUPTIONS:
        assert to_uint8(Corruption(name, 0)(picture(), 3)).equal(eval_image(picture(), SIZE)), name


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_numbers_give_the_same_picture_and_others_another(name):
    image = picture(SIZE, SIZE)
    first = np.asarray(Corruption(name, 3)(image, 5))
    np.random.seed(1)
    Corruption(name, 2)(image, 4)
    assert (first == np.asarray(Corruption(name, 3)(image, 5))).all() and first.shape == (SIZE, SIZE, 3)
    others = [Corruption(name, 3)(image, 6), Corruption(name, 3, seed=1)(image, 5)]
    random = name.endswith("noise") or name in ("motion_blur", "fog", "elastic_transform")
    assert all((first != np.asarray(other)).any() == random for other in others)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_picture_moves_further_from_itself_with_severity(name):
    image = picture(SIZE, SIZE)
    clean = np.asarray(image, dtype=np.float64)
    # Of several samples, since every severity has its own random numbers.
    corrupted = [[np.asarray(Corruption(name, s)(image, i)) for i in range(8)] for s in range(6)]
    distances = [np.abs(np.stack(of_severity) - clean).mean() for of_severity in corrupted]
    assert distances[0] == 0 and min(distances[1:]) > 2
    if name not in NOT_IN_ORDER:
        assert distances == sorted(distances) and len(set(distances)) == 6


def test_colours_are_those_of_colorsys():
    x = np.random.default_rng(0).random((3, 4, 3))
    x[0, 0], x[0, 1], x[0, 2], x[1, 0] = 0, 1, 0.5, (0.2, 0.2, 0.7)
    for severity in range(1, 6):
        factor, summand = pixels.SATURATE[severity - 1]
        for place in np.ndindex(3, 4):
            h, s, v = colorsys.rgb_to_hsv(*x[place])
            brighter = colorsys.hsv_to_rgb(h, s, min(v + pixels.BRIGHTNESS[severity - 1], 1))
            assert pixels.brightness(x, severity, None)[place] == pytest.approx(brighter, abs=1e-12)
            saturated = colorsys.hsv_to_rgb(h, min(s * factor + summand, 1), v)
            assert pixels.saturate(x, severity, None)[place] == pytest.approx(saturated, abs=1e-12)


def test_noises_have_the_moments_that_their_parameters_say():
    grey = np.full((200, 200, 3), 0.4)
    n = grey.size
    expected = {
        "gaussian_noise": lambda s: (0.4, pixels.GAUSSIAN_NOISE[s]),
        "speckle_noise": lambda s: (0.4, 0.4 * pixels.SPECKLE_NOISE[s]),
        "shot_noise": lambda s: (0.4, math.sqrt(0.4 / pixels.SHOT_NOISE[s])),
    }
    for name, moments in expected.items():
        for severity in range(1, 6):
            x = CORRUPTIONS[name](grey, severity, np.random.default_rng(severity))
            mean, deviation = moments(severity - 1)
            assert x.mean() == pytest.approx(mean, abs=5 * deviation / math.sqrt(n))
            assert x.std() == pytest.approx(deviation, rel=0.02)
    for severity, share in enumerate(pixels.IMPULSE_NOISE, start=1):
        x = pixels.impulse_noise(grey, severity, np.random.default_rng(severity))
        for value in (0, 1):
            assert (x == value).mean() == pytest.approx(share / 2, abs=5 * math.sqrt(share / 2 / n))
        assert ((x == 0.4) | (x == 0) | (x == 1)).all()


def test_contrast_pixelate_and_jpeg_are_what_their_names_say():
    x = np.random.default_rng(1).random((6, 5, 3))
    for channel in range(3):
        mean = sum(x[:, :, channel].flatten()) / 30
        assert pixels.contrast(x, 2, None)[2, 3, channel] == pytest.approx(mean + 0.3 * (x[2, 3, channel] - mean))
    blocks = np.asarray(Corruption("pixelate", 5)(picture(SIZE, SIZE), 0), dtype=np.float64)
    means = np.asarray(picture(SIZE, SIZE), dtype=np.float64).reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean(axis=(1, 3))
    assert (blocks[::4, ::4] == blocks[3::4, 3::4]).all() and np.abs(blocks[::4, ::4] - means).max() <= 1
    file = io.BytesIO()
    picture(SIZE, SIZE).save(file, "JPEG", quality=15)
    assert (np.asarray(Image.open(file)) == np.asarray(Corruption("jpeg_compression", 3)(picture(SIZE, SIZE), 0))).all()


def test_blurs_equal_sums_pixel_by_pixel():
    x = np.random.default_rng(2).random((40, 36, 3))
    places = [(0, 0), (20, 17), (39, 35), (3, 30)]

    def at(row, column):  # mirrored without the edge's pixel
        row, column = abs(row), abs(column)
        return x[min(row, 78 - row), min(column, 70 - column)]

    kernel = blurs.disc(3, 0.1)
    assert kernel.shape == (17, 17) and kernel.sum() == pytest.approx(1) and (kernel > 1e-9).sum() == 29
    for place in places:
        total = sum(kernel[8 - i, 8 - j] * at(place[0] + i, place[1] + j) for i in range(-8, 9) for j in range(-8, 9))
        assert blurs.defocus_blur(x, 1, None)[place] == pytest.approx(total, abs=1e-9)
        weights = {(i, j): math.exp(-(i * i + j * j) / 2) for i in range(-4, 5) for j in range(-4, 5)}
        inside = [(w, min(max(place[0] + i, 0), 39), min(max(place[1] + j, 0), 35)) for (i, j), w in weights.items()]
        total = sum(w * x[row, column] for w, row, column in inside) / sum(weights.values())
        assert blurs.gaussian_blur(x, 1, None)[place] == pytest.approx(total, abs=1e-9)
        taps = [math.exp(-(i * i) / 18) for i in range(21)]
        total = sum(tap * x[place[0], min(place[1] + i, 35)] for i, tap in enumerate(taps)) / sum(taps)
        assert blurs.moved(x, 10, 3, 0.0)[place] == pytest.approx(total)
        total = sum(tap * x[min(place[0] + i, 39), place[1]] for i, tap in enumerate(taps)) / sum(taps)
        assert blurs.moved(x, 10, 3, math.pi / 2)[place] == pytest.approx(total)


def test_zooms_keep_the_centre_and_lookups_keep_lines_straight():
    row, column = np.mgrid[:SIZE, :SIZE].astype(float)
    line = (0.3 + row / 900 + column / 700)[..., None]
    assert blurs.zoomed(line, 1.0) == pytest.approx(line)
    twice = blurs.zoomed(line, 2.0)[..., 0]  # 112 pixels from 56 on, corner to corner
    assert twice[0, 0] == pytest.approx(line[56, 56, 0]) and twice[-1, -1] == pytest.approx(line[167, 167, 0])
    assert np.diff(twice, axis=1) == pytest.approx(111 / 223 / 700)
    here = blurs.looked_up(line, row * 0.5 + 3.25, column * 0.25 + 20, half=0)
    assert here[..., 0] == pytest.approx(0.3 + (row * 0.5 + 3.25) / 900 + (column * 0.25 + 20) / 700)
    small = np.arange(4.0).reshape(1, 4, 1) * np.ones((2, 1, 1))
    at = np.array([[-2.0, -0.25, 3.25, 5.0]])
    assert blurs.looked_up(small, at * 0, at, half=0).flatten() == pytest.approx([2, 0.25, 2.75, 1])
    assert blurs.looked_up(small, at * 0, at, half=0.5).flatten() == pytest.approx([1, 0, 3, 2])


def test_fog_is_a_cloud_that_keeps_the_brightest_value():
    cloud = pixels.plasma(256, 2.0, np.random.default_rng(0))
    assert cloud.min() == 0 and cloud.max() == 1
    assert np.abs(np.diff(cloud, axis=0)).mean() < 0.02, "neighbours are alike"
    x = to_pixels(picture(SIZE, SIZE))
    foggy = pixels.fog(x, 1, np.random.default_rng(0))
    assert foggy == pytest.approx((x + 1.5 * cloud[:SIZE, :SIZE, None]) * x.max() / (x.max() + 1.5))


def test_names_and_severities_as_they_are_written():
    assert parse_corruptions(["fog:2", "contrast"]) == (
        Corruption("fog", 2), *(Corruption("contrast", s) for s in range(1, 6))
    )  # fmt: skip
    assert [c.name for c in parse_corruptions(["all:3"])] == [name for name in CORRUPTIONS if name not in EXTRA]
    for words, said in (
        (["fogg"], "Did you mean `fog`"),
        (["fog:6"], "a number from 1 to 5"),
        (["fog:"], "a number from 1 to 5"),
        (["fog", "fog:2"], "fog:2 is asked for twice"),
    ):
        with pytest.raises(UserError, match=said):
            parse_corruptions(words)
