"""A step on a weighted sum of terms over further views equals the float64 single-process step on the global batch."""

import pytest

from tests.distributed import objectives_worker
from tests.distributed.launch import cases_of


@pytest.mark.parametrize("ranks", [1, 2])
def test_objectives_with_further_views_are_exact(ranks, tmp_path):
    *cases, step = cases_of(objectives_worker, ranks, tmp_path)
    assert len(cases) == 12
    assert not [case for case in cases if any(value > 1e-5 for value in case["wrong"].values())]
    titles = ["pair", "contrast_image_image_2", "contrast_text_text_2", "contrast_text_2_image"]
    titles += ["contrast_image.projector_image_2.projector", "contrast_text_2.words_text"]
    assert list(step["terms"]) == titles and step["loss"] == pytest.approx(step["total"], rel=1e-6)
    missing, other = step["refused"]
    assert "batch.views['image_2'], which is missing" in missing
    assert "the view image_2 is torch.float32" in other and "it must be torch.uint8" in other
