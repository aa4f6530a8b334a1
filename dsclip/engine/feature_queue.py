"""The features of earlier steps as extra negatives (MoCo, He et al. 2020), the same on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dsclip.config.schema import LossSection
from dsclip.distributed import Collectives
from dsclip.engine.state import QueueState
from dsclip.errors import UserError
from dsclip.losses.blocks import blocks
from dsclip.plan.free_memory import free_bytes
from dsclip.saving import Files

FILE = "queue.safetensors"


class FeatureQueue:
    """A ring of the last `queue_size` pairs. `shape_image`, `shape_text`: the shape of one sample's features.

    Captions of token-wise features [T, d] keep which of their tokens exist.
    """

    def __init__(
        self, loss: LossSection, shape_image: tuple[int, ...], shape_text: tuple[int, ...], device: torch.device
    ):
        self.size, self._warmup_steps = loss.queue_size, loss.queue_warmup_steps
        needed = 4 * self.size * (torch.Size(shape_image).numel() + torch.Size(shape_text).numel() + 2)
        if needed > _free_bytes(device):
            raise UserError(
                f"loss.queue_size {self.size} needs {needed / 2**30:.1f} GiB on every rank and "
                f"{_free_bytes(device) / 2**30:.1f} GiB are free; choose a smaller queue"
            )
        self._tensors = {
            "image": torch.zeros(self.size, *shape_image, device=device),
            "text": torch.zeros(self.size, *shape_text, device=device),
            "keys": torch.zeros(self.size, dtype=torch.int64, device=device),
        }
        if len(shape_text) == 2:
            self._tensors["text_valid"] = torch.zeros(self.size, shape_text[0], dtype=torch.bool, device=device)
        self.filled = self._next = 0

    def replicated(self) -> dict[str, Tensor]:
        """All of it by name; the same on every rank."""
        return {f"queue.{name}": x for name, x in self._tensors.items()}

    @property
    def bytes(self) -> int:
        """As `save` writes them."""
        return sum(x.numel() * x.element_size() for x in self._tensors.values())

    def negatives(self, step: int) -> dict[str, Tensor]:
        """The queue as fields of `Pairs`; nothing during the warm-up. step: optimizer steps done."""
        ready = self.filled == self.size if self._warmup_steps is None else step >= self._warmup_steps
        if not ready or not self.filled:
            return {}
        return {f"queue_{name}": tensor[: self.filled] for name, tensor in self._tensors.items()}

    def negatives_shape(self, kind: str) -> tuple[int, ...]:
        """The shape of one queued sample's features, of `image` or `text`."""
        return tuple(self._tensors[kind].shape[1:])

    def push(
        self, image: Tensor, text: Tensor, keys: Tensor | None, group: Collectives, text_valid: Tensor | None = None
    ) -> None:
        """Adds the pairs of all ranks in place of the oldest ones. Collective. image, text: this rank's features.

        text_valid [n, T] bool: the tokens that exist, of token-wise features.
        """
        if keys is None:
            keys = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        new = {"image": image, "text": text, "keys": keys}
        if "text_valid" in self._tensors:
            if text_valid is None:
                raise ValueError("a queue of token-wise features needs text_valid")
            new["text_valid"] = text_valid
        total = len(image) * group.world_size
        dropped = max(0, total - self.size)  # of more pairs than have a place the last ones count
        for name, x in new.items():
            for rank, (block,) in blocks([x], group):
                first = rank * len(image) - dropped  # where the block's first pair would go
                kept = block[max(0, -first) :]
                places = (self._next + max(0, first) + torch.arange(len(kept), device=x.device)) % self.size
                self._tensors[name][places] = kept.to(self._tensors[name].dtype)
        self._next = (self._next + total - dropped) % self.size
        self.filled = min(self.size, self.filled + total - dropped)

    def save(self, files: Files, folder: Path) -> QueueState:
        """Writes the features (call it on one rank) and returns the position for JSON."""
        files.tensors(self._tensors, folder / FILE)
        return self.state()

    def state(self) -> QueueState:
        """The position in the ring."""
        return {"filled": self.filled, "next": self._next}

    def load(self, folder: Path, state: QueueState | None) -> None:
        """Restores what `save` wrote. A token-wise queue of an earlier version, without `text_valid`, fills anew."""
        self.filled = self._next = 0
        if state is None:
            return  # the run had no queue before: it fills anew
        tensors = load_file(str(folder / FILE), device=str(self._tensors["image"].device))
        if tensors["image"].shape != self._tensors["image"].shape:
            raise UserError(
                f"{folder} holds a queue of {len(tensors['image'])} pairs and loss.queue_size is {self.size}; "
                "resume with the same size"
            )
        if tensors.keys() == self._tensors.keys():
            self._tensors, self.filled, self._next = tensors, state["filled"], state["next"]


def _free_bytes(device: torch.device) -> int:
    """Memory that can be allocated now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_bytes()
