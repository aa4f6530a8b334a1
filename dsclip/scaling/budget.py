"""What to train with so many GPU hours: the model, data and samples seen of the lowest predicted error, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dsclip.config import Recipe, load_ds_config
from dsclip.config.schema import BatchSection
from dsclip.errors import UserError
from dsclip.model.flops import forward_flops
from dsclip.model.presets import PRESETS
from dsclip.plan import estimate, plan_batch
from dsclip.plan.machine import Machine, named_gpu
from dsclip.plan.measured import measured
from dsclip.scaling.joint import JointLaw, fit_joint, sizes_of
from dsclip.scaling.law import Array
from dsclip.scaling.points import Point

# Of a card's peak, where nobody measured dsclip on it: around the published 21% of an H100 and 39% of an A100 (NVIDIA NeMo's
# tables of CLIP training); the plan itself assumes 40%.
EFFICIENCY = (0.2, 0.5)
MEASURED_WITHIN = 0.1  # of a measured rate: another cluster, another loader; our assumption
DATA_BELOW = 1.05  # times the runs' largest size: beyond it something is extrapolated


@dataclass(frozen=True)
class Rate:
    """A model's speed on the cluster. samples_per_second: of all GPUs; low, high: what it may be."""

    model: str
    gmacs_per_sample: float
    samples_per_second: float
    low: float
    high: float
    fits: bool
    source: str


def rates(points: Sequence[Point], card: str, gpus: int, batch: int) -> list[Rate]:
    """Of every preset, and of models of the points that are none (by their operations alone), by the plan."""
    if batch % gpus:
        raise UserError(f"--batch is {batch}, which {gpus} GPUs can't share evenly; give a multiple of --gpus")
    machine = named_gpu(card)
    found = [_planned(name, machine, gpus, batch) for name in PRESETS if name != "demo"]
    known = {r.model for r in found}
    for p in points:
        if p.model and p.model not in known and p.gmacs_per_sample:
            known.add(p.model)
            found.append(_by_operations(p.model, p.gmacs_per_sample, machine, gpus))
    published = {p.model: p.gmacs_per_sample for p in points if p.gmacs_per_sample}
    # A study's own count of a model's operations is the one that its law was fitted with.
    return [replace(r, gmacs_per_sample=published.get(r.model) or r.gmacs_per_sample) for r in found]


def _planned(name: str, machine: Machine, gpus: int, batch: int) -> Rate:
    config, known = PRESETS[name], measured(machine, name)
    if known is not None:
        machine = replace(machine, efficiency=known.efficiency)
    sizes = BatchSection(global_batch_size=batch)
    ds_config = load_ds_config("zero3_bf16", Recipe(batch=sizes), gpus)
    planned, plan = plan_batch(config, sizes, ds_config, gpus, machine)
    speeds = [
        estimate(config, planned, ds_config, gpus, replace(machine, efficiency=efficiency)).samples_per_second
        for efficiency in _efficiencies(machine.efficiency, known is not None)
    ]
    source = "assumed" if known is None else f"measured, {known.source}"
    gmacs = sum(forward_flops(config)) / 2e9
    return Rate(name, gmacs, speeds[0], speeds[1], speeds[2], plan.fits, f"plan, efficiency {source}")


def _by_operations(name: str, gmacs: float, machine: Machine, gpus: int) -> Rate:
    speeds = [gpus * machine.tflops * 1e12 * e / (6e9 * gmacs) for e in _efficiencies(machine.efficiency, False)]
    return Rate(
        name,
        gmacs,
        speeds[0],
        speeds[1],
        speeds[2],
        True,
        "operations alone, no preset of that name; efficiency assumed",
    )


def _efficiencies(planned: float, is_measured: bool) -> tuple[float, float, float]:
    if is_measured:
        return planned, planned * (1 - MEASURED_WITHIN), planned * (1 + MEASURED_WITHIN)
    return planned, *EFFICIENCY


def decide(
    points: Sequence[Point],
    gpu_hours: float,
    card: str,
    *,
    gpus: int = 8,
    batch: int = 2048,
    draws: int = 500,
    seed: int = 0,
) -> dict[str, Any]:
    """{"best", "candidates", "law"} for one family on one task: {"model", "data", "samples_seen", "error", "error_ci95", …}.

    Every draw is a resample of the runs with its law, a speed of the card within its range, and a run's own noise.
    Raises UserError where the points can't say what model, data and samples seen each do.
    """
    rng = np.random.default_rng(seed)
    laws = fit_joint(points, draws, rng)
    if laws is None:
        raise UserError(
            f"--budget needs runs of at least 3 models and 3 numbers of samples seen on {points[0].task} by {points[0].family}: "
            f"{len(points)} are too few, or all alike"
        )
    law, resampled = laws
    seconds = gpu_hours * 3600 / gpus
    sets = sorted({(p.data_samples, p.data) for p in points if p.data_samples}) or [(np.inf, "as in the runs")]
    noise, place = law.noise * rng.standard_normal(draws), rng.random(draws)
    candidates: list[dict[str, Any]] = []
    errors: list[Array] = []
    for rate in rates(points, card, gpus, batch):
        if not rate.fits:
            continue
        speed = rate.low + (rate.high - rate.low) * place
        for size, data in sets:
            here = _sizes(rate, np.array([seconds * rate.samples_per_second]), size)
            there = _sizes(rate, seconds * speed, size)[:, None, :]
            drawn = resampled.error(there)[:, 0]
            errors.append(drawn)
            low, high = (float(v) for v in np.percentile(drawn * np.exp(noise), [2.5, 97.5]))
            candidates.append({
                "model": rate.model, "data": data, "samples_seen": float(here[0, 1]), "gmacs": float(here[0, 0] * here[0, 1]),
                "error": float(law.error(here)[0, 0]), "error_ci95": [low, high],
                "samples_per_second": rate.samples_per_second, "samples_per_second_range": [rate.low, rate.high],
                "rate_from": rate.source, "extrapolated": _beyond(rate, here[0], points),
            })  # fmt: skip
    if not candidates:
        raise UserError(
            f"no model fits {gpus} × {card} with a global batch of {batch}; give more --gpus or a smaller --batch"
        )
    first = np.argmin(np.stack(errors), axis=0)
    for number, candidate in enumerate(candidates):
        candidate["best_in_draws"] = float((first == number).mean())
    candidates.sort(key=lambda c: float(c["error"]))
    return {
        "gpu_hours": gpu_hours, "gpu": card, "gpus": gpus, "task": points[0].task, "metric": points[0].metric,
        "family": points[0].family, "best": candidates[0], "candidates": candidates, "law": _described(law, resampled),
    }  # fmt: skip


def _sizes(rate: Rate, seen: Array, data: float) -> Array:
    """[m, 3] as the joint law takes them."""
    return np.stack([np.full_like(seen, rate.gmacs_per_sample), seen, np.minimum(seen, data)], -1)


def _beyond(rate: Rate, sizes: Array, points: Sequence[Point]) -> list[str]:
    """What lies outside the runs that the law was fitted through, in words."""
    runs = sizes_of([p for p in points if p.gmacs_per_sample and p.samples_seen])
    found = []
    for column, what in ((0, "the model"), (1, "the samples seen")):
        low, high = runs[:, column].min(), runs[:, column].max()
        if sizes[column] > high * DATA_BELOW:
            found.append(f"{what}: {sizes[column] / high:.1f} times the largest of the runs")
        elif sizes[column] < low / DATA_BELOW:
            found.append(f"{what}: {sizes[column] / low:.2g} of the smallest of the runs")
    total, most = sizes[0] * sizes[1], (runs[:, 0] * runs[:, 1]).max()
    if total > most * DATA_BELOW:
        found.append(f"the compute: {total / most:.1f} times the largest of the runs")
    if rate.model not in {p.model for p in points}:
        found.append("the model: none of the runs has it")
    return found


def _described(law: JointLaw, resampled: JointLaw) -> dict[str, Any]:
    terms = len(law.factors)
    ends = np.percentile(resampled.theta, [2.5, 97.5], axis=0)
    exponents = {
        name: {"exponent": float(law.theta[0, terms + j]), "exponent_ci95": [float(ends[0, terms + j]), float(ends[1, terms + j])]}
        for j, name in enumerate(law.factors)
    }  # fmt: skip
    return {
        "points": law.points, "noise": law.noise, "factors": exponents, "irreducible": float(law.theta[0, -1]),
        "irreducible_ci95": [float(ends[0, -1]), float(ends[1, -1])],
    }  # fmt: skip
