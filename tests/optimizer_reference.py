"""Each optimizer in a few lines of float64, a tensor at a time: what dsclip's must equal under every ZeRO stage."""

import torch

MOMENTUM = 0.95


def step(name: str, p: torch.Tensor, g: torch.Tensor, s: dict, t: int, lr: float, decay: float, o, key: str) -> None:
    """One step of a tensor p with gradient g, in place. s: its state; t: from 1; o: OptimSection; key: the tensor's name."""
    for moment in ("m", "v"):
        s.setdefault(moment, torch.zeros_like(p))
    matrix = p.dim() == 2 and ".blocks." in key
    if name == "lion":
        update = torch.sign(o.beta1 * s["m"] + (1 - o.beta1) * g)
        s["m"] = o.beta2 * s["m"] + (1 - o.beta2) * g
        p -= lr * (update + decay * p)
        return
    if name == "muon" and matrix:
        s["m"] = MOMENTUM * s["m"] + (1 - MOMENTUM) * g
        u = (1 - MOMENTUM) * g + MOMENTUM * s["m"]
        parts = u.chunk(3) if key.endswith("qkv.weight") else [u]
        p -= lr * decay * p + lr * torch.cat([0.2 * max(x.shape) ** 0.5 * newton_schulz(x) for x in parts])
        return
    s["m"] = o.beta1 * s["m"] + (1 - o.beta1) * g
    s["v"] = o.beta2 * s["v"] + (1 - o.beta2) * g * g
    m, v = s["m"] / (1 - o.beta1**t), s["v"] / (1 - o.beta2**t)
    u = m / (v.sqrt() + o.eps) + decay * p
    if name == "lamb" and decay:
        lr *= p.norm() / u.norm()
    if name == "stable_adamw":
        s["rms"] = (g * g / v.clamp(min=o.eps**2)).mean().sqrt()
        lr /= max(1.0, s["rms"].item())
    p -= lr * u


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x
