"""Locked towers in one process: the gradients of the rest, what is computed and kept, and what is refused."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsclip.config import load_recipe
from dsclip.create import create_model
from dsclip.errors import UserError
from dsclip.model.lock import lock_tower
from tests.test_model_clip import SMALL, pairs

MODES = ("none", "selective", "full", "offload")
IMAGES, TOKENS = pairs()


def model(lock="none", unlocked_layers=0):
    torch.manual_seed(0)
    clip = create_model("demo", **SMALL).double()
    lock_tower(clip, lock, unlocked_layers)
    return clip


def backward(clip, **options):
    """The gradients that a loss of both towers' features leaves."""
    image, text = clip(IMAGES, TOKENS, **options)
    (image @ text.T).sin().sum().backward()
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("checkpointing", MODES)
@pytest.mark.parametrize("lock, unlocked_layers", [("image", 0), ("image", 2), ("text", 0), ("text", 1)])
def test_what_is_trained_has_the_gradient_that_it_has_without_a_lock(lock, unlocked_layers, checkpointing, chunk_size):
    options = dict(checkpointing=checkpointing, chunk_size=chunk_size)
    clip = model(lock, unlocked_layers)
    everything, ours = backward(model(), **options), backward(clip, **options)
    assert set(ours) == {name for name, p in clip.named_parameters() if p.requires_grad}
    frozen = "visual." if lock == "image" else "text."
    last = [f"{frozen}{layer}" for layer in ("head.", f"blocks.{len(clip.visual.blocks) - 1}.")[:unlocked_layers]]
    left = set(everything) - set(ours)
    assert left and left == {n for n in everything if n.startswith(frozen) and not n.startswith(tuple(last))}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, everything[name], rtol=1e-12, atol=1e-14)


class Operations(TorchDispatchMode):
    """Counts those of products, forward and backward; torch's own counter can't be used around autograd.grad."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if count := flop_registry.get(function.overloadpacket):
            self.total += count(*arguments, **(options or {}), out_val=result)
        return result


def products(run) -> int:
    with Operations() as counter:
        run()
    return counter.total


@pytest.mark.parametrize("checkpointing", MODES)
def test_a_locked_tower_is_computed_once_and_keeps_nothing(checkpointing):
    options = dict(checkpointing=checkpointing, chunk_size=3)

    def both(clip):
        image, text = clip(IMAGES, TOKENS, **options)
        (text.sum() + image.sum()).backward()

    def text_alone(clip):
        clip(None, TOKENS, **options)[1].sum().backward()

    with torch.no_grad():
        forward = products(lambda: model()(IMAGES, None, **options))
    locked, text = products(lambda: both(model("image"))), products(lambda: text_alone(model()))
    assert forward > 0 and locked == forward + text < products(lambda: both(model()))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        image, _ = model("image")(IMAGES, None, **options)
        assert not image.requires_grad and not kept
        model()(IMAGES, None, **options)
        assert kept or checkpointing == "offload"  # whose inputs wait in host memory


def test_what_would_lock_nothing_is_refused():
    layers = SMALL["vision_layers"] + 2
    assert model("image", layers - 1).visual.embed.position_embedding.requires_grad is False
    with pytest.raises(UserError, match=f"model.unlocked_layers is {layers}, and the image tower has {layers} layers"):
        model("image", layers)


@pytest.mark.parametrize(
    "keys, words",
    [
        (["model.unlocked_layers=1"], "belongs to `model.lock: image` or `text`"),
        (["model.lock=text", "model.init=x", "loss.queue_size=512", "loss.queue_momentum=0.9"], "no moving average"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(keys, words):
    with pytest.raises(UserError, match=words):
        load_recipe("demo", keys)
