"""The loss with its gradients at large global batches, beside packages that have kernels for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch

from dsclip.bench.gpu.row import Facts, Row, Settings
from dsclip.bench.loss import dense, installed, random_features, tiled
from dsclip.bench.loss import measure as measure_loss
from dsclip.losses.products import Precision

SIZES = ((32_768, 768), (65_536, 768), (131_072, 768), (262_144, 1024))
# `tiled` takes the device's precision; `tiled_bf16` does, of features that travelled in bf16.
PRECISIONS = [*(f"tiled_{precision}" for precision in get_args(Precision)), "tiled_bf16"]
LINE_N, LINE_MS, LINE_MB = 65_536, 50, 1_400


def measure(settings: Settings) -> Iterator[Row | Facts]:
    """Equality with the dense loss, then milliseconds and extra memory by N; a package's where it is installed."""
    sizes = ((512, 64),) if settings.tiny else SIZES
    yield from _equal_to_dense(*sizes[0])
    for n, d in sizes:
        found: dict[str, float] = {}
        variants = ["tiled", "memeff", "tiled_sigmoid", "siglip_kernel"]
        variants += ["dense"] if n == sizes[0][0] else []
        variants += PRECISIONS if n == LINE_N or settings.tiny else []
        for variant in variants:
            name = f"N = {n:,}, d = {d}, {variant.replace('_', ' ')}"
            if not installed(variant):
                yield Row(name, None, "ms", note="not installed")
                continue
            try:
                cost = measure_loss(variant, n, d, 1 + settings.repeats)
            except torch.OutOfMemoryError:
                yield Row(name, None, "ms", note="out of memory")
                continue
            found[variant] = ms = 1e3 * cost["seconds"]
            lined = variant == "tiled" and n == LINE_N
            yield Row(name, ms, "ms", accept=LINE_MS if lined else None, at_most=True)
            yield Row(f"{name}: extra", cost["extra_peak_mb"], "MB", accept=LINE_MB if lined else None, at_most=True)
        for ours, package in (("tiled", "memeff"), ("tiled_sigmoid", "siglip_kernel")):
            if ours in found and package in found:
                yield Row(f"N = {n:,}, {ours} / {package}: time", found[ours] / found[package], accept=1, at_most=True)


def _equal_to_dense(n: int, d: int) -> Iterator[Row]:
    image, text, log_scale = random_features(n, d)
    loss, *expected = dense(image, text, log_scale)
    found = tiled(image, text, log_scale)
    for name, a, b in zip(
        ("loss", "image gradient", "text gradient", "log scale's gradient"),
        (found.loss, found.d_image, found.d_text, found.d_log_scale), (loss, *expected), strict=True,
    ):  # fmt: skip
        error = float((a.double() - b.double()).norm() / b.double().norm())
        yield Row(f"N = {n:,}: {name} against dense", error, accept=1e-4, at_most=True, exactness=True)
