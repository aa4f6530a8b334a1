"""Sparse differences of fine-tunes: the largest changes of a model's weights, kept in a file, and added to it again.

Several are composed by addition. Source: Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer",
which keeps the parameters that changed most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsclip.checkpoint import Checkpoint
from dsclip.engine.consolidate import ShardedWeights
from dsclip.errors import UserError
from dsclip.evaluate.results.protocol import state_sha256
from dsclip.files import write_whole
from dsclip.weights.combine import check_alike

PLACES, VALUES = ".places", ".values"  # of a tensor in the file: int64 in the flattened tensor, float32
BINS = 1 << 16


@dataclass(frozen=True)
class Difference:
    """What a file holds. base_sha256: of the weights that the values are added to; scale, bias: of log logit scale and bias."""

    path: Path
    places: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    scale: float
    bias: float | None
    base_sha256: str
    parameters: int

    @property
    def kept(self) -> int:
        """How many numbers are changed."""
        return sum(len(places) for places in self.places.values())


def largest_changes(base: Checkpoint, tuned: Checkpoint, keep: float) -> tuple[dict[str, Tensor], int]:
    """({name.places, name.values}, parameters): of all parameters the share `keep` that changed most.

    Exactly round(keep · parameters) of them; of equal changes the first. One tensor at a time is in memory, thrice.
    """
    parameters = sum(tensor.numel() for tensor in base.state_dict.values())
    count = round(keep * parameters)
    least, of_least = _threshold(lambda: (change.abs() for _, change in _changes(base, tuned)), count)
    found: dict[str, Tensor] = {}
    for name, change in _changes(base, tuned):
        flat = change.abs().flatten()
        chosen = flat > least
        equal = (flat == least).nonzero().flatten()[:of_least]
        chosen[equal] = True
        of_least -= len(equal)
        places = chosen.nonzero().flatten()
        if len(places):
            found[name + PLACES], found[name + VALUES] = places, change.flatten()[places]
    return found, parameters


def _changes(base: Checkpoint, tuned: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in base.state_dict.items():
        yield name, tuned.state_dict[name] - tensor


def _threshold(tensors: Callable[[], Iterable[Tensor]], count: int) -> tuple[float, int]:
    """(the count-th largest of float32 numbers ≥ 0, how many equal to it are among the largest).

    tensors(): the numbers, read twice. A float's bits are in the order of its values: the upper half is counted, then the
    lower half of those with the upper half in question.
    """
    if count == 0:
        return math.inf, 0
    upper = torch.zeros(BINS, dtype=torch.int64)
    for bits in _bits(tensors()):
        upper += torch.bincount(bits >> 16, minlength=BINS)
    above, high = _bin(upper, count)
    lower = torch.zeros(BINS, dtype=torch.int64)
    for bits in _bits(tensors()):
        lower += torch.bincount(bits[bits >> 16 == high] & (BINS - 1), minlength=BINS)
    above_too, low = _bin(lower, count - above)
    value = torch.tensor([high << 16 | low], dtype=torch.int32).view(torch.float32).item()
    return value, count - above - above_too


def _bits(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    for tensor in tensors:
        yield tensor.flatten().view(torch.int32).long()


def _bin(counts: Tensor, count: int) -> tuple[int, int]:
    """(how many are in the bins above, the bin) of the count-th from above."""
    from_above = counts.flip(0).cumsum(0)
    place = int((from_above >= count).int().argmax())
    return int(from_above[place - 1]) if place else 0, BINS - 1 - place


def write_difference(path: Path, base: Checkpoint, tuned: Checkpoint, keep: float) -> Difference:
    """The sparse difference as a safetensors file. Raises UserError for models that differ in more than their weights."""
    check_alike(base, tuned)
    if path.exists():
        raise UserError(f"{path} exists already; choose another file or remove it")
    tensors, parameters = largest_changes(base, tuned, keep)
    if not any(values.any() for name, values in tensors.items() if name.endswith(VALUES)):
        why = (
            f"--keep {keep:g} of {parameters:,} parameters is none" if not tensors else "the two have the same weights"
        )
        raise UserError(f"{tuned.path} differs from {base.path} in nothing that would be kept: {why}")
    scale = math.log(tuned.logit_scale) - math.log(base.logit_scale)
    bias = None if base.logit_bias is None or tuned.logit_bias is None else tuned.logit_bias - base.logit_bias
    said = {"scale": scale, "bias": bias, "base_sha256": state_sha256(base.state_dict), "parameters": parameters}
    write_whole(path, save(tensors, metadata={"dsclip_difference": json.dumps(said)}))
    return read_difference(path)


def read_difference(path: Path) -> Difference:
    """Raises UserError for what is no such file."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})["dsclip_difference"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} is no difference that tools/compose.py wrote: {error}") from error
    places, values = (
        {name.removesuffix(end): tensor for name, tensor in tensors.items() if name.endswith(end)} for end in (PLACES, VALUES)
    )  # fmt: skip
    return Difference(path, places, values, said["scale"], said["bias"], said["base_sha256"], said["parameters"])


def changed(differences: Sequence[Difference]) -> int:
    """How many parameters some difference changes."""
    names = {name for difference in differences for name in difference.places}
    return sum(len(torch.cat([d.places[name] for d in differences if name in d.places]).unique()) for name in names)


def compose(base: Checkpoint, differences: Sequence[Difference], shares: Sequence[float]) -> Checkpoint:
    """The base with every difference added, each times its share. Raises UserError for another base than they were taken from."""
    digest = state_sha256(base.state_dict)
    for difference in differences:
        if difference.base_sha256 != digest:
            raise UserError(
                f"{difference.path} was taken from other weights than {base.path}; compose it with its own base"
            )
    log_scale = math.log(base.logit_scale) + sum(s * d.scale for s, d in zip(shares, differences, strict=True))
    bias = base.logit_bias
    if bias is not None:
        bias += sum(share * (d.bias or 0.0) for share, d in zip(shares, differences, strict=True))
    composed = ShardedWeights({name: partial(_composed, name, base, differences, shares) for name in base.state_dict})
    return replace(base, state_dict=composed, logit_scale=math.exp(log_scale), logit_bias=bias, step=0, samples=0)


def _composed(
    name: str, base: Checkpoint, differences: Sequence[Difference], shares: Sequence[float]
) -> Tensor:  # fmt: skip
    total = base.state_dict[name].double()
    flat = total.view(-1)
    for difference, share in zip(differences, shares, strict=True):
        if name in difference.places:
            flat.index_add_(0, difference.places[name], share * difference.values[name].double())
    return total.float()
