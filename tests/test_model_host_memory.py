"""What is alive between forward and backward: with `offload` nothing on the device, with `full` the layers' inputs."""

import gc
import weakref

import pytest
import torch

from dsclip.create import create_model
from dsclip.model.blocks import Block
from dsclip.model.host_memory import HostLine
from dsclip.model.layer_major import ChunkedPass
from dsclip.model.patch_dropout import visible_patches

SMALL = dict(vocab_size=60, eot_token_id=59, context_length=24, vision_layers=2)
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)


def block(device: str) -> Block:
    torch.manual_seed(0)
    return Block(32, 4, 64, "gelu", 1e-5, causal=False, text_layers=None).to(device)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize(("checkpointing", "alive"), [("none", 3), ("full", 3), ("offload", 0)])
def test_inputs_on_the_device_between_forward_and_backward(device, checkpointing, alive):
    """Three chunks go through two blocks; what lies between is held by the second block alone."""
    first, second, host = block(device), block(device), HostLine()
    inputs = [torch.randn(2, 7, 32, device=device).requires_grad_() for _ in range(3)]
    between = first(None, *inputs, chunked=ChunkedPass(checkpointing, (), host))
    storages = [weakref.ref(chunk.untyped_storage()) for chunk in between]  # tensors that share memory share it
    outputs = second(None, *between, chunked=ChunkedPass(checkpointing, (), host))
    host.leave()
    del between
    gc.collect()
    assert sum(storage() is not None for storage in storages) == alive
    torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    assert all(chunk.grad is not None for chunk in inputs)
    gc.collect()
    assert not any(storage() is not None for storage in storages)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("checkpointing", ["full", "offload"])
def test_gradients_are_those_of_a_graph_that_stays(device, checkpointing, chunk_size):
    """Patches that are left out and end tokens go with their chunks."""
    torch.manual_seed(0)
    model = create_model("demo", **SMALL).double().to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8, generator=generator).to(device)
    tokens = torch.randint(0, 59, (7, 24), generator=generator)
    tokens[torch.arange(7), torch.arange(7) * 3 + 1] = 59
    visible = visible_patches(torch.arange(7), 16, 0.5, seed=0, step=0).to(device)

    def gradients(**options) -> torch.Tensor:
        model.zero_grad()
        image, text = model(images, tokens.to(device), visible_patches=visible, **options)
        ((image @ text.T).sin().sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    found = gradients(checkpointing=checkpointing, chunk_size=chunk_size)
    torch.testing.assert_close(found, gradients(), rtol=1e-11, atol=1e-13)


def test_copies_come_back_one_ahead_of_what_is_asked_for():
    """Chunks of a layer first to last, layers last to first."""
    host = HostLine()
    first, second = (host.send([(torch.full((2,), 10.0 * layer + i),) for i in range(2)]) for layer in range(2))
    order = [*second, *first]
    asked = []
    for i, copies in enumerate(order):
        (tensor,) = copies.back()
        asked.append(tensor[0].item())
        assert [c._back != () for c in order[i + 1 :]] == [j == 0 for j in range(len(order) - i - 1)]
    assert asked == [10, 11, 0, 1]
