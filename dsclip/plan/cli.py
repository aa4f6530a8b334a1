"""The command line of tools/plan.py."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from dsclip.command_line import parser, run_tool
from dsclip.config import Recipe, load_ds_config, load_recipe
from dsclip.config.schema import Checkpointing
from dsclip.data import load_tokenizer
from dsclip.errors import UserError
from dsclip.files import write_whole
from dsclip.model import resolve_preset
from dsclip.model.presets import AUTO
from dsclip.model.trained import trained_part
from dsclip.plan.advice import advice, describe_choice
from dsclip.plan.choose import plan_batch
from dsclip.plan.estimate import Estimate, parameter_counts
from dsclip.plan.interconnect import LINKS, Interconnect
from dsclip.plan.machine import USABLE, Machine, named_gpu, this_machine
from dsclip.plan.measured import measured
from dsclip.plan.reliability_cli import add_reliability, refuse_without, reliability
from dsclip.plan.scaling import figure, point, scaling
from dsclip.plan.scaling import table as scaling_table
from dsclip.plan.workload import Workload

EXAMPLE = (
    "python tools/plan.py --preset ViT-H-14 --ds_config ds_configs/zero3_bf16.json --gpus 64 --batch 32768 --gpu H100"
)

FLAGS = {
    "batch.global_batch_size": "--batch", "batch.micro_batch_size": "--micro-batch",
    "batch.chunk_size": "--chunk-size", "batch.checkpointing": "--checkpointing", "batch.memory_gb": "--memory-gb",
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """tools/plan.py."""
    p = parser("What an optimizer step takes: memory by part, communication, operations; and what to change.", EXAMPLE)
    p.add_argument("--preset", default="ViT-B-32", help="model, or the recipe's with --config (default: ViT-B-32)")
    p.add_argument("--config", help="a recipe whose model, batch and loss sections count")
    p.add_argument("--ds_config", default="zero3_bf16", help="DeepSpeed JSON (default: zero3_bf16)")
    p.add_argument("--gpus", type=int, default=1, help="ranks of the whole job (default: 1)")
    p.add_argument("--batch", type=int, help="global batch (default: 256, or the recipe's)")
    p.add_argument("--micro-batch", type=int, help="samples that a rank embeds in one forward; default: planned")
    p.add_argument("--chunk-size", type=int, help="samples that go through a block at a time; default: planned")
    p.add_argument("--checkpointing", choices=get_args(Checkpointing))
    p.add_argument("--gpu", help="plan for a GPU by name, such as H100, and not for this machine")
    p.add_argument(
        "--memory-gb", type=float, help="memory of a rank, 10⁹ bytes (default: the GPU's; of a CPU what is free)"
    )
    p.add_argument("--peak-tflops", type=float, help="bf16 peak of a rank (default: by the device's name)")
    p.add_argument("--efficiency", type=float, help="share of the peak that training reaches (default: 0.4 on GPUs)")
    p.add_argument("--bandwidth", type=float, help="GB/s of a rank's collectives (default: 50 on GPUs)")
    net = p.add_argument_group(
        "many nodes: what is computed while weights and gradients travel, and the same for 8 to 1,024 GPUs"
    )
    net.add_argument("--nodes", type=int, help="how many; with --gpus-per-node in place of --gpus")
    net.add_argument("--gpus-per-node", type=int, help="(default: 8, or --gpus where there are fewer)")
    net.add_argument(
        "--interconnect", choices=tuple(LINKS), help="a rank's link between nodes; --bandwidth says otherwise"
    )
    net.add_argument("--figure", type=Path, metavar="SVG", help="draw MFU against the number of GPUs")
    add_reliability(p)
    p.add_argument("--text-tokens", type=int, help="of the longest caption in a chunk (default: the context length)")
    p.add_argument("overrides", nargs="*", metavar="section.key=value", help="as of launchers/train.py")
    sys.exit(run_tool(plan, p.parse_args(argv)))


def plan(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """{"fits", "peak_mb", "parts", "gathers_per_step", "gflops_per_sample", …}: see `Estimate`."""
    a = arguments
    for name in ("gpus", "peak_tflops", "efficiency", "bandwidth", "text_tokens", "nodes", "gpus_per_node"):
        value = getattr(a, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be greater than 0")
    if a.efficiency is not None and a.efficiency > 1:
        raise UserError(f"--efficiency is {a.efficiency}; it is a share of the peak, at most 1")
    net = _interconnect(a)
    if a.reliability:
        return reliability(a)
    refuse_without(a)
    preset = [f"model.preset={a.preset}"] if a.config is None else []
    given = {key: flag for key, flag in FLAGS.items() if _value(a, flag) is not None}
    overrides = [f"{key}={_value(a, flag)}" for key, flag in given.items()]
    try:
        recipe = load_recipe(a.config or "demo", preset + a.overrides + overrides)
        ds_config = load_ds_config(a.ds_config, recipe, a.gpus)
    except UserError as error:
        raise UserError(_by_flags(str(error), given)) from error
    if recipe.model.preset == AUTO and recipe.model.init:
        raise UserError(
            f"the model is that of model.init={recipe.model.init}, which no plan reads; give the preset with its sizes (model.preset=)"
        )
    own = recipe.model.overrides
    config = resolve_preset(recipe.model.preset, **own, **({} if a.config is None else _vocabulary(recipe)))
    machine, source = _machine(a, recipe.model.name)
    trained = trained_part(config, recipe.model, recipe.objective)
    if net is not None and (
        trained.parameters < trained.of or recipe.objective.further_views or recipe.objective.heads
    ):
        raise UserError(
            "the layer-by-layer simulation of --nodes, --gpus-per-node and --interconnect is of a step that trains all weights on images and captions: "
            "leave out model.lock, model.lora_rank, heads and terms over further views, or plan with --gpus alone, which counts them"
        )
    work = Workload.of(recipe, trained, a.text_tokens)
    batch, found = plan_batch(config, recipe.batch, ds_config, a.gpus, machine, work)
    changes = []
    if not found.fits:
        machine = machine if batch.memory_gb is None else replace(machine, memory_gb=batch.memory_gb)
        changes = advice(config, batch, ds_config, a.gpus, machine, work)
    result = {
        "model": recipe.model.name, "global_batch_size": batch.global_batch_size,
        "fits": found.fits, "peak_mb": found.peak_mb, "parts": found.parts, "host_mb": found.host_mb, "device": machine.device,
        "memory_mb": 1e3 * (batch.memory_gb or machine.memory_gb), "parameters": parameter_counts(config)[0], "trained_parameters": trained.parameters,
        "micro_batch_size": found.micro_batch, "chunk_size": found.chunk, "checkpointing": found.checkpointing,
        "micro_batches": found.micro_batches, "gathers_per_step": found.gathers_per_step,
        "reductions_per_step": found.reductions_per_step, "gathered_mb_per_step": found.gathered_mb_per_step,
        "reduced_mb_per_step": found.reduced_mb_per_step, "gflops_per_sample": found.gflops_per_sample,
        "recomputed_gflops_per_sample": found.recomputed_gflops_per_sample,
        "samples_per_second": found.samples_per_second, "changes": changes, "efficiency_from": source,
    }  # fmt: skip
    text = table(result, found, machine, a.gpus, a.text_tokens or config.context_length) + f"; {source}"
    if net is not None:
        here = point(config, batch, ds_config, net, machine, a.text_tokens)
        points = scaling(config, batch, ds_config, net, machine, a.text_tokens)
        result |= {"overlap": asdict(here), "scaling": [asdict(p) for p in points]}
        between = f"{net.link} between nodes of {net.gpus_per_node}, {net.gigabytes_per_second:g} GB/s a rank"
        text += f"\n\nsimulated layer by layer, {between}:\n{scaling_table([here])}"
        text += f"\n\n{batch.global_batch_size // a.gpus:,} samples a rank:\n{scaling_table(points)}"
        if a.figure is not None:
            write_whole(a.figure, figure(points, f"{recipe.model.name}, {machine.name}, {net.link}"))
    return result, text


def _interconnect(a: argparse.Namespace) -> Interconnect | None:
    """The ranks of --nodes and --gpus-per-node, also put into a.gpus; None where nobody asks about nodes."""
    if a.nodes is None and a.gpus_per_node is None and a.interconnect is None:
        if a.figure is not None:
            raise UserError("--figure needs --interconnect: it shows MFU against the number of GPUs")
        return None
    per_node = a.gpus_per_node or min(8, a.gpus if a.nodes is None else 8)
    if a.nodes is None and a.gpus % per_node:
        raise UserError(f"--gpus is {a.gpus}, which is no multiple of --gpus-per-node {per_node}")
    nodes = a.nodes or a.gpus // per_node
    if a.nodes is not None and a.gpus not in (1, nodes * per_node):
        raise UserError(f"--gpus is {a.gpus}, but {nodes} nodes of {per_node} are {nodes * per_node}: leave --gpus out")
    if a.gpu is None:
        raise UserError("--nodes, --gpus-per-node and --interconnect need --gpu, such as H100")
    a.gpus = nodes * per_node
    net = Interconnect(a.interconnect or "400g", nodes, per_node, a.bandwidth)
    a.bandwidth = net.gigabytes_per_second
    return net


def _value(a: argparse.Namespace, flag: str) -> Any:
    return getattr(a, flag.removeprefix("--").replace("-", "_"))


def _by_flags(message: str, given: dict[str, str]) -> str:
    """A message about recipe keys in the words of who gave them as flags."""
    for key, flag in given.items():
        message = message.replace(f"`{key}`", flag).replace(key, flag)
    return message


def _vocabulary(recipe: Recipe) -> dict[str, int]:
    """The rows of the token embedding and the end token; CLIP's where the tokenizer isn't at hand."""
    try:
        tokenizer = load_tokenizer("demo" if recipe.data.tokenizer == AUTO else recipe.data.tokenizer)
    except UserError:
        return {}
    return {"vocab_size": tokenizer.vocab_size, "eot_token_id": tokenizer.eot_token_id}


def _machine(a: argparse.Namespace, preset: str) -> tuple[Machine, str]:
    """The machine, and where its efficiency comes from."""
    if a.gpu is not None:
        machine = named_gpu(a.gpu, a.memory_gb, a.peak_tflops)
    else:
        machine = this_machine(a.gpus)
    given = {
        "tflops": a.peak_tflops,
        "memory_gb": a.memory_gb,
        "efficiency": a.efficiency,
        "gigabytes_per_second": a.bandwidth,
    }
    machine = replace(machine, **{k: v for k, v in given.items() if v is not None})
    if a.efficiency is not None:
        return machine, "efficiency as given"
    found = measured(machine, preset) if machine.device == "cuda" else None
    if found is None:
        return machine, "efficiency assumed, not measured"
    return replace(machine, efficiency=found.efficiency), f"efficiency measured, {found.source}"


def table(result: dict[str, Any], found: Estimate, machine: Machine, ranks: int, tokens: int) -> str:
    """The plan for people."""
    device = (
        f"{ranks} × {machine.name}" if machine.device == "cuda" else f"{_count(ranks, 'rank')} of this machine's CPU"
    )
    model = f"{result['model']}, {result['parameters'] / 1e6:.0f} M parameters"
    if result["trained_parameters"] < result["parameters"]:
        model += f", {result['trained_parameters'] / 1e6:.1f} M of them trained"
    lines = [f"{model}, global batch {result['global_batch_size']:,} on {device}: {describe_choice(found)}", ""]
    lines += [f"  {name.replace('_', ' '):18} {size:12,.0f} MB" for name, size in found.parts.items() if size >= 0.5]
    limit = f"of {result['memory_mb']:,.0f} MB, {USABLE:.0%} of which a plan may use"
    lines += [f"  {'peak':18} {found.peak_mb:12,.0f} MB  {limit}", ""]
    if found.host_mb:
        lines[-1:] = [
            f"  {'checkpoint copy':18} {found.host_mb:12,.0f} MB  of host memory, for saving in the background",
            "",
        ]
    gathers = f"{_count(found.gathers_per_step, 'all-gather')} of the parameters ({found.gathered_mb_per_step:,.0f} MB)"
    reductions = (
        f"{_count(found.reductions_per_step, 'reduction')} of the gradients ({found.reduced_mb_per_step:,.0f} MB)"
    )
    lines.append(f"a step   {gathers}, {reductions}")
    again = f"{found.recomputed_gflops_per_sample:,.1f} computed again"
    lines.append(f"a sample {found.gflops_per_sample:,.1f} GFLOPs, and {again}; captions of up to {tokens} tokens")
    rate = f"{machine.efficiency:.0%} of {machine.tflops:,.1f} TFLOP/s a rank, {machine.gigabytes_per_second:g} GB/s"
    lines.append(
        f"expected {found.samples_per_second:,.{0 if found.samples_per_second >= 10 else 2}f} samples/s at {rate}"
    )
    if not found.fits:
        lines += ["", "It does not fit. What would:"]
        lines += [f"  - {c}" for c in result["changes"]] or [
            "  - nothing known here, and no batch is small enough: take a smaller model or more memory"
        ]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
