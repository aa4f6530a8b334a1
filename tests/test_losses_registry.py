"""Losses by name: those of users, what they may return, and names that are refused."""

import pytest
import torch

from dsclip import losses
from dsclip.errors import UserError
from dsclip.losses import LossGrads, Negatives
from tests.test_losses import CLOSE, Case


def triplet(image, text, log_scale, bias):
    logits = log_scale.exp() * image @ text.T
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(image)))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_users_dense_loss_by_name(world_size):
    losses.register("image to text only", DENSE)
    case = Case("image to text only", world_size, 4, extras=False)
    results = case.ours(Negatives(), None)
    image, text, log_scale = (x.clone().requires_grad_() for x in (case.image, case.text, case.log_scale))
    value = triplet(image, text, log_scale, None)
    value.backward()
    torch.testing.assert_close(torch.cat([r.d_image for r in results]), image.grad, **CLOSE)
    torch.testing.assert_close(torch.cat([r.d_text for r in results]), text.grad, **CLOSE)
    assert all(torch.equal(r.d_log_scale, log_scale.grad) for r in results)


DENSE = losses.from_dense(triplet)


def test_a_plugin_file_registers_its_loss_once(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dsclip import losses\n"
        "losses.register('half', losses.from_dense(lambda i, t, s, b: -(i * t).sum() / (2 * len(i))))\n"
    )
    loss = losses.find_loss("half", str(file))
    assert losses.find_loss("half", str(file)) is loss
    found = loss(Case("softmax", 1, 3, extras=False).pairs(0))
    assert found.d_log_scale == 0  # it isn't used
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match="broken.py could not be imported: ZeroDivisionError"):
        losses.find_loss("half", str(tmp_path / "broken.py"))


def test_unknown_names_and_taken_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="softmax"):
        losses.find_loss("softmaxx")
    with pytest.raises(UserError, match="registered already"):
        losses.register("softmax", DENSE)
    with pytest.raises(UserError, match="no file"):
        losses.find_loss("softmax", str(tmp_path / "none.py"))


@pytest.mark.parametrize("field", ["d_image", "d_text", "d_log_scale", "loss"])
def test_a_loss_with_wrong_shapes_is_refused(field):
    case = Case("softmax", 1, 3, extras=False)

    def broken(pairs, **options):
        good = losses.softmax(pairs, **options)
        return LossGrads(**(vars(good) | {field: getattr(good, field).unsqueeze(0)}))

    with pytest.raises(UserError, match=field):
        losses.checked(broken, case.pairs(0))
    with pytest.raises(UserError, match="LossGrads"):
        losses.checked(lambda pairs: 1.0, case.pairs(0))
