"""The same local batch on 8 to 1,024 GPUs: a table, and a figure of MFU against their number."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsclip.config.deepspeed import DsConfig, resolve_persistence
from dsclip.config.schema import BatchSection
from dsclip.model import ClipConfig
from dsclip.model.flops import forward_flops
from dsclip.plan.estimate import parameter_counts, recomputed
from dsclip.plan.interconnect import Interconnect
from dsclip.plan.machine import Machine
from dsclip.plan.schedule import FP32, Timeline, parts_of, simulate, way

COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 560, 300, 60, 20, 20, 50


@dataclass(frozen=True)
class Point:
    """A step on so many GPUs. mfu: recomputation not counted; waits: seconds by reason, those above zero."""

    gpus: int
    seconds: float
    busy: float
    samples_per_second: float
    mfu: float
    waits: dict[str, float]


def point(
    config: ClipConfig, batch: BatchSection, ds_config: DsConfig, net: Interconnect, machine: Machine,
    text_tokens: int | None = None,
) -> Point:  # fmt: skip
    """The step of a planned batch section, whose global batch is that of net's ranks."""
    micro_batch, _, checkpointing = batch.sizes(net.ranks)
    local = batch.global_batch_size // net.ranks
    parameters, _ = parameter_counts(config)
    order = way(
        resolve_persistence(ds_config, batch), parameters, local, -(-local // micro_batch), recomputed(checkpointing, machine.device),
        bool(batch.coalesce_reduction),
    )  # fmt: skip
    features = 2 * FP32 * config.embed_dim * batch.global_batch_size
    rate = machine.tflops * 1e12 * machine.efficiency
    step = simulate(parts_of(config, text_tokens), order, rate, net, features)
    return _point(step, net.ranks, batch.global_batch_size, 3 * sum(forward_flops(config, text_tokens)), machine.tflops)


def _point(step: Timeline, ranks: int, global_batch: int, flops: float, tflops: float) -> Point:
    per_second = global_batch / step.seconds
    waits = {reason: seconds for reason, seconds in step.waits.items() if seconds > 1e-9}
    return Point(ranks, step.seconds, step.busy, per_second, per_second / ranks * flops / (tflops * 1e12), waits)


def scaling(
    config: ClipConfig, batch: BatchSection, ds_config: DsConfig, net: Interconnect, machine: Machine,
    text_tokens: int | None = None,
) -> list[Point]:  # fmt: skip
    """Points for 8 to 1,024 GPUs in nodes of the same size, each with the same local batch."""
    local, found = batch.global_batch_size // net.ranks, []
    nodes = [count // net.gpus_per_node for count in COUNTS if count % net.gpus_per_node == 0]
    for there in (replace(net, nodes=n) for n in nodes or range(1, 9)):
        sizes = replace(batch, global_batch_size=local * there.ranks)
        found.append(point(config, sizes, ds_config, there, machine, text_tokens))
    return found


def table(points: list[Point]) -> str:
    """A line a number of GPUs."""
    lines = [f"  {'GPUs':>5} {'samples/s':>10} {'step':>9} {'waits':>9}  {'MFU':>6}  waits for"]
    for p in points:
        reasons = sorted(p.waits.items(), key=lambda item: -item[1])
        where = ", ".join(f"{reason} {1e3 * seconds:,.0f} ms" for reason, seconds in reasons if seconds >= 5e-4)
        waits = 1e3 * (p.seconds - p.busy)
        lines.append(
            f"  {p.gpus:5} {p.samples_per_second:10,.0f} {1e3 * p.seconds:6,.0f} ms {waits:6,.0f} ms  {p.mfu:6.1%}  {where}"
        )
    return "\n".join(lines)


def figure(points: list[Point], title: str) -> str:
    """MFU against the number of GPUs, as SVG."""
    top = max(0.1, max(p.mfu for p in points) * 1.15)
    inner = WIDTH - LEFT - RIGHT

    def x(number: int) -> float:
        return LEFT + inner * (number + 0.5) / len(points)

    def y(mfu: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - mfu / top)

    line = " ".join(f"{x(i):.1f},{y(p.mfu):.1f}" for i, p in enumerate(points))
    marks = [
        f'<circle cx="{x(i):.1f}" cy="{y(p.mfu):.1f}" r="3.5"/><text x="{x(i):.1f}" y="{y(p.mfu) - 9:.1f}">{p.mfu:.1%}</text>'
        f'<text x="{x(i):.1f}" y="{HEIGHT - BOTTOM + 18}">{p.gpus:,}</text>'
        for i, p in enumerate(points)
    ]
    style = "text { font: 12px sans-serif; fill: #1f2933; text-anchor: middle } circle { fill: #486581 } .axis { stroke: #7b8794 }"
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">',
        f"<style>{style} polyline {{ fill: none; stroke: #486581; stroke-width: 2 }}</style>",
        f'<rect width="100%" height="100%" fill="white"/><text x="{WIDTH / 2}" y="{TOP - 4}">{title}</text>',
        f'<line class="axis" x1="{LEFT}" y1="{y(0):.1f}" x2="{WIDTH - RIGHT}" y2="{y(0):.1f}"/>',
        f'<polyline points="{line}"/>', *marks,
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}">GPUs, the same local batch on each; planned MFU</text>', "</svg>", "",
    ])  # fmt: skip
