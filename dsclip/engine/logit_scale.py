"""The temperature: a float32 scalar that every rank holds and updates alike, outside the sharded engine.

In bf16 it would move in steps of 3 %, and DeepSpeed 0.19.8 crashes on 0-dim parameters under ZeRO-3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsclip.config.schema import LossSection, OptimSection


class LogitScale:
    """log s with its own AdamW (no decay) and CLIP's clamp 1 ≤ s ≤ max_logit_scale after each step."""

    def __init__(self, loss: LossSection, optim: OptimSection, device: torch.device):
        self._max_log = math.log(loss.max_logit_scale)
        start = torch.tensor(-math.log(loss.init_temperature), dtype=torch.float32, device=device)
        self.log = torch.nn.Parameter(start.clamp(0, self._max_log))
        self._adamw = torch.optim.AdamW(
            [self.log], lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=0.0
        )

    @property
    def scale(self) -> float:
        """s itself, the factor on cosine similarities."""
        return math.exp(self.log.item())

    def step(self, gradient: Tensor, lr: float) -> None:
        """One AdamW step with the global gradient for log s, then the clamp."""
        self._adamw.param_groups[0]["lr"] = lr
        self.log.grad = gradient.to(self.log.dtype)
        self._adamw.step()
        self.log.grad = None
        with torch.no_grad():
            self.log.clamp_(0, self._max_log)

    def set_scale(self, scale: float) -> None:
        """Starts from the temperature of existing weights."""
        with torch.no_grad():
            self.log.fill_(math.log(scale)).clamp_(0, self._max_log)

    def state(self) -> dict[str, float]:
        """Four numbers that JSON keeps exactly (float32 fits into a double)."""
        moments = self._adamw.state.get(self.log, {})
        return {"log": self.log.item()} | {k: moments[k].item() for k in ("step", "exp_avg", "exp_avg_sq") if moments}

    def load_state(self, state: dict[str, float]) -> None:
        """Restores what `state` returned, bit for bit."""
        with torch.no_grad():
            self.log.fill_(state["log"])
        if "step" in state:
            self._adamw.state[self.log] = {
                "step": torch.tensor(state["step"], dtype=torch.float32),
                "exp_avg": torch.full_like(self.log, state["exp_avg"]),
                "exp_avg_sq": torch.full_like(self.log, state["exp_avg_sq"]),
            }
