"""Gradients of embedding tables in bf16: added up in float32 and rounded once, however often a row is used."""

import pytest
import torch

from dsclip.model import resolve_preset
from dsclip.model.layer_major import ChunkedPass, dummy_input
from dsclip.model.towers import TextEmbed, VisionEmbed

ROUNDED_ONCE = 2**-9  # half a unit of bf16's last place
CONFIG = resolve_preset(
    "demo", image_size=64, patch_size=16, vision_width=32, text_width=32, vocab_size=40, eot_token_id=39
)


def error(ours, exact) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


def added_up(index, grads, rows) -> torch.Tensor:
    """Σ of the gradients [..., W] of each row, in float64, [rows, W]."""
    width = grads.shape[-1]
    return torch.zeros(rows, width).double().index_add_(0, index.flatten(), grads.double().reshape(-1, width))


@pytest.mark.parametrize("chunks", [1, 3])
def test_token_embeddings(chunks):
    torch.manual_seed(0)
    embed = TextEmbed(CONFIG).bfloat16()
    tokens = torch.randint(0, 39, (300, 16))
    tokens[:, 0] = 38  # as the start token, in every caption
    grads = (torch.randn(300, 16, 32) + 0.5).bfloat16()
    outputs = embed(dummy_input(torch.device("cpu")), *tokens.chunk(chunks), chunked=ChunkedPass())
    torch.autograd.backward(outputs, grads.chunk(chunks))
    assert error(embed.token_embedding.grad, added_up(tokens, grads, 40)) < ROUNDED_ONCE


def test_position_embeddings_of_visible_patches():
    torch.manual_seed(0)
    embed = VisionEmbed(CONFIG).bfloat16()
    embed.ln_pre = torch.nn.Identity()
    images = torch.randint(0, 256, (300, 3, 64, 64), dtype=torch.uint8)
    visible = torch.stack([torch.randperm(16)[:8] for _ in range(300)])
    (tokens,) = embed(dummy_input(torch.device("cpu")), images, chunked=ChunkedPass(contexts=((visible,),)))
    grads = (torch.randn(300, 9, 32) + 0.5).bfloat16()
    tokens.backward(grads)
    expected = torch.cat([grads[:, 0].double().sum(0, keepdim=True), added_up(visible, grads[:, 1:], 16)])
    assert error(embed.position_embedding.grad, expected) < ROUNDED_ONCE
