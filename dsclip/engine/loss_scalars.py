"""Temperature and logit bias: float32 scalars that every rank holds and updates alike, outside the sharded engine.

In bf16 the temperature would move in steps of 3 %, and DeepSpeed 0.19.8 crashes on 0-dim parameters under ZeRO-3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsclip.config.schema import LossSection, OptimSection
from dsclip.losses import LossGrads


class LossScalars:
    """log s and, for losses that have one, the bias: AdamW without decay, and CLIP's clamp 1 ≤ s ≤ max_logit_scale.

    s is learned, fixed, or scheduled: log s then goes evenly from its initial to its final value over the run.
    """

    def __init__(
        self, loss: LossSection, optim: OptimSection, total_steps: int, device: torch.device, *, has_bias: bool
    ):
        self._max_log = math.log(loss.max_logit_scale)
        self._learned, self._total_steps = loss.temperature == "learned", total_steps
        scheduled = loss.final_temperature if loss.temperature == "scheduled" else None
        self._final = None if scheduled is None else -math.log(scheduled)
        start = torch.tensor(-math.log(loss.init_temperature), dtype=torch.float32, device=device)
        self.log_scale = torch.nn.Parameter(start.clamp(0, self._max_log))
        self._start = self.log_scale.item()
        self.bias: torch.nn.Parameter | None = None
        if has_bias:
            self.bias = torch.nn.Parameter(torch.tensor(loss.init_bias, dtype=torch.float32, device=device))
        self._adamw = torch.optim.AdamW(
            list(self.named().values()), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=0.0
        )

    def named(self) -> dict[str, torch.nn.Parameter]:
        """What the loss learns beside the towers."""
        named = {"log_scale": self.log_scale, "bias": self.bias}
        return {name: p for name, p in named.items() if p is not None}

    @property
    def scale(self) -> float:
        """s itself, the factor on cosine similarities."""
        return math.exp(self.log_scale.item())

    def before_step(self, step: int) -> None:
        """Sets a scheduled temperature for step `step`, counted from 0."""
        if self._final is not None:
            progress = min(1.0, step / max(1, self._total_steps - 1))
            self._set_log(self._start + progress * (self._final - self._start))

    def step(self, grads: LossGrads, lr: float) -> None:
        """One AdamW step with the global gradients, then the clamp."""
        self._adamw.param_groups[0]["lr"] = lr
        if self._learned:
            self.log_scale.grad = grads.d_log_scale.to(torch.float32)
        if self.bias is not None:
            if grads.d_bias is None:
                raise RuntimeError("a loss with a bias gave no gradient for it")
            self.bias.grad = grads.d_bias.to(torch.float32)
        self._adamw.step()
        self._adamw.zero_grad()
        with torch.no_grad():
            self.log_scale.clamp_(0, self._max_log)

    def set_scale(self, scale: float) -> None:
        """Starts from the temperature of existing weights."""
        self._set_log(math.log(scale))
        self._start = self.log_scale.item()

    def set_bias(self, bias: float) -> None:
        """Starts from the bias of existing weights, if this loss has one."""
        if self.bias is not None:
            with torch.no_grad():
                self.bias.fill_(bias)

    def _set_log(self, value: float) -> None:
        with torch.no_grad():
            self.log_scale.fill_(value).clamp_(0, self._max_log)

    def replicated(self) -> dict[str, Tensor]:
        """All of it by name, the moments too; the same on every rank."""
        moments = {f"{n}.{k}": v for n, p in self.named().items() for k, v in self._adamw.state.get(p, {}).items()}
        return self.named() | moments

    def state(self) -> dict[str, dict[str, float]]:
        """A few numbers by scalar, which JSON keeps exactly (float32 fits into a double)."""
        states = {}
        for name, parameter in self.named().items():
            moments = self._adamw.state.get(parameter, {})
            states[name] = {"value": parameter.item()} | {k: v.item() for k, v in moments.items()}
        states["log_scale"]["start"] = self._start  # a schedule goes on from here, not from the recipe's temperature
        return states

    def load_state(self, states: dict[str, dict[str, float]]) -> None:
        """Restores what `state` returned, bit for bit."""
        for name, parameter in self.named().items():
            state = dict(states[name])
            if name == "log_scale":
                self._start = state.pop("start", self._start)
            with torch.no_grad():
                parameter.fill_(state.pop("value"))
            self._adamw.state.pop(parameter, None)
            if state:
                self._adamw.state[parameter] = {k: _like(parameter, k, v) for k, v in state.items()}


def _like(parameter: Tensor, name: str, value: float) -> Tensor:
    # AdamW keeps its step count on the CPU.
    return torch.tensor(value, dtype=torch.float32) if name == "step" else torch.full_like(parameter, value)
