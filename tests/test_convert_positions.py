"""Positions for other lengths, against what the papers say, in float64."""

import pytest
import torch

from dsclip.convert import export_hf
from dsclip.convert.positions import resize_text_positions
from dsclip.create import create_model
from dsclip.errors import UserError
from tests.test_convert import checkpoint_of, perturbed, small
from tests.test_convert_source import SHAPES


def long_clip(positions, factor=4, kept=20):
    """Long-CLIP's stretch as its authors write it: four new positions from each old one, the last ones beyond the end."""
    length, width = positions.shape
    stretched = torch.zeros(factor * length - (factor - 1) * kept, width, dtype=positions.dtype)
    stretched[:kept] = positions[:kept]
    for i in range(length - 1 - kept):
        for j in range(factor):
            share = j / factor
            stretched[factor * i + j + kept] = (1 - share) * positions[i + kept] + share * positions[i + 1 + kept]
    for j in range(factor):
        stretched[j - factor] = positions[-1] + j / factor * (positions[-1] - positions[-2])
    return stretched


@pytest.mark.parametrize("length, factor", [(77, 4), (32, 3), (22, 2)])
def test_long_clips_rule_is_the_papers(length, factor):
    positions = torch.randn(length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = long_clip(positions, factor)
    assert length != 77 or len(expected) == 248
    torch.testing.assert_close(
        resize_text_positions(positions, len(expected), "long_clip"), expected, rtol=1e-12, atol=1e-12
    )
    single = resize_text_positions(positions.float(), len(expected), "long_clip")
    assert torch.equal(single[:20], positions[:20].float())
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stretch", ["linear", "long_clip"])
def test_a_line_of_positions_stays_one(stretch):
    """What both rules keep exactly, away from the ends, whatever the length."""
    positions = torch.arange(77, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0], dtype=torch.float64)
    for context in (78, 100, 248):
        steps = resize_text_positions(positions, context, stretch).diff(dim=0)
        inner = steps[20:] if stretch == "long_clip" else steps[2:-2]
        torch.testing.assert_close(inner, inner[:1].expand_as(inner), rtol=1e-9, atol=1e-9)
    assert torch.equal(resize_text_positions(positions, 30, stretch), positions[:30])


def test_short_captions_keep_their_features_with_long_clips_rule(demo, tmp_path):
    model = perturbed(small("demo"))
    export_hf(checkpoint_of(model, demo), tmp_path / "hf")
    longer = create_model("demo", init=str(tmp_path / "hf"), stretch="long_clip", **SHAPES | {"context_length": 68})
    tokens = torch.full((3, 32), 611)
    tokens[:, :19] = torch.randint(0, 600, (3, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(longer(None, torch.nn.functional.pad(tokens, (0, 36)))[1], model(None, tokens)[1])


def test_what_can_not_be_stretched_so_is_refused():
    with pytest.raises(UserError, match="keeps 20 positions, and there are 16"):
        resize_text_positions(torch.zeros(16, 2), 32, "long_clip")
    with pytest.raises(UserError, match="model.stretch is `cubic`"):
        resize_text_positions(torch.zeros(16, 2), 32, "cubic")
