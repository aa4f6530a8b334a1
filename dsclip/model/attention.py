"""Softmax attention, and which of torch's kernels computes it.

Shapes: B samples of a chunk, H heads, T tokens, W width.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsclip.errors import UserError
from dsclip.model.config import ClipConfig

CPU_PLAIN_TOKENS = 256
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, backend: str = "auto") -> Tensor:
    """Softmax attention of q, k, v [B, H, T, W/H]. backend: one of `BACKENDS` alone; auto: what suits the device.

    On a CPU torch's fused kernel takes five times as long as three plain products for CLIP's short sequences (forward
    and backward in bf16, 64 × 12 heads × 50 tokens: 52 ms against 10 ms); for long ones its memory counts. On a GPU
    torch chooses.
    """
    if backend != "auto":
        with sdpa_kernel(BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if q.device.type != "cpu" or q.shape[2] > CPU_PLAIN_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)
    if causal:
        scores = scores + scores.new_full(scores.shape[2:], -torch.inf).triu(1)
    mixed: Tensor = scores.softmax(dim=3) @ v
    return mixed


def check_attention(config: ClipConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Runs `model.attention` once, forward and backward, in the shapes of both towers; raises UserError where it can't."""
    c, backend = config, config.attention
    if backend == "auto":
        return
    for tower, tokens, heads, width, causal in (
        ("image", c.vision_registers + c.image_tokens, c.vision_heads, c.vision_width, False),
        ("text", c.context_length, c.text_heads, c.text_width, c.text_pool == "end"),
    ):
        shape = (1, heads, tokens, width // heads)
        q, k, v = (torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
        try:
            # torch raises one sentence for all reasons, and warns of each.
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                attention(q, k, v, causal=causal, backend=backend).sum().backward()
        except RuntimeError as error:
            reasons = [str(w.message).splitlines()[0].split(" (Triggered")[0] for w in said] or [
                str(error).split(". ")[0] + "."
            ]
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
            raise UserError(
                f"model.attention={backend} can't compute the {tower} tower's attention ({tokens} tokens, heads of "
                f"{width // heads}, {str(dtype).removeprefix('torch.')}{', causal' if causal else ''}) on {name}: "
                f"{' '.join(reasons)} Choose another backend, or auto"
            ) from error
