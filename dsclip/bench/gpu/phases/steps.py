"""Whole optimizer steps of one preset, as the plan runs them."""

from __future__ import annotations

from collections.abc import Iterator

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.measure import product_tflops, utilisation
from dsclip.bench.step import measure as measure_step
from dsclip.model import resolve_preset
from dsclip.model.flops import forward_flops

CAPTIONS = (23, 24)  # an end token at place 23: 24 tokens are computed


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """Samples/s with its lines; MFU by the tokens computed and by whole contexts, of the datasheet and of a product."""
    o = settings.options
    preset, n = ("demo", 16) if settings.tiny else (o["preset"], o["batch"])
    steps = measure_step("dsclip", preset, n, settings.repeats, "auto", caption_tokens=CAPTIONS)
    rate, note = steps["samples_per_second"], steps["schedule"]
    yield Row(f"{preset}, n = {n}", rate, "samples/s", accept=o["accept"], stretch=o["stretch"], note=note)
    planned = f"{steps['planned_peak_mb']:,.0f} MB planned"
    yield Row(f"{preset}: peak memory", steps["peak_mb"], "MB", note=planned)
    product = settings.facts.get("product_tflops") or product_tflops(settings.device, 256 if settings.tiny else 8192)
    whole = 3 * sum(forward_flops(resolve_preset(preset)))
    for what, flops in (("tokens computed", 1e9 * steps["gflops_per_sample"]), ("whole contexts", whole)):
        mfu = utilisation(flops * rate, product)
        if mfu["datasheet"] is not None:
            yield Row(f"{preset}: MFU, {what}, of {mfu['datasheet_tflops']:.0f} TFLOP/s", mfu["datasheet"])
        yield Row(f"{preset}: MFU, {what}, of the product measured", mfu["measured"])
    keys = ("samples_per_second", "seconds", "peak_mb", "planned_peak_mb", "gflops_per_sample", "recomputed_gflops_per_sample",
            "checkpointing", "text_lengths")  # fmt: skip
    yield {f"step {preset}": {"batch": n, **{key: steps[key] for key in keys}}}
