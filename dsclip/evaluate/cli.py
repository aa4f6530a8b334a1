"""The command line of `launchers/evaluate.py`, on one process or many."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dsclip.command_line import parser, report_error, say
from dsclip.data import EvalDataset, build_eval_dataset
from dsclip.data.corruptions.corruption import parse_corruptions
from dsclip.datasets.inspect_cli import add_remote, storage_of
from dsclip.distributed import Collectives, check_one_job, launched_ranks, shutdown_distributed, take_slurm_ranks
from dsclip.errors import UserError
from dsclip.evaluate import TASKS, measure_task
from dsclip.evaluate.arguments import NEGATIVE_KEY, add_task_options, check_keys, task_options
from dsclip.evaluate.opened import DTYPES, OpenedModel, Wanted, open_model
from dsclip.evaluate.progress import EvaluationProgress
from dsclip.evaluate.results.protocol import whole_protocol
from dsclip.evaluate.results.record import result_of, write_result
from dsclip.evaluate.results.report import markdown, text
from dsclip.evaluate.suites.cli import NONE, add_suite_options, check_choice, evaluate_suite, feature_cache
from dsclip.evaluate.suites.report import suite_markdown, suite_text
from dsclip.evaluate.tasks.corrupted import Corrupted
from dsclip.evaluate.tasks.task import Task

# An adapter's features, and all objects that ranks exchange, are in host memory: NCCL alone has nothing for those.
ON_GPUS = "cpu:gloo,cuda:nccl"
EXAMPLE = "torchrun --nproc_per_node 2 launchers/evaluate.py --model runs/demo --task retrieval --data demo:val"


def main(argv: list[str] | None = None) -> None:
    """Parses, evaluates on all ranks, prints on rank 0, exits with 0, 1 or 2."""
    arguments = _parser().parse_args(argv)
    try:
        take_slurm_ranks()
        rank = launched_ranks()[0]
    except UserError as error:
        sys.exit(report_error(error, as_json=arguments.json))
    try:
        result = evaluate(arguments)
    except (Exception, KeyboardInterrupt) as error:
        code = getattr(error, "exit_code", 1)
        if rank == 0:
            code = report_error(error, as_json=arguments.json)
        elif not isinstance(error, UserError):
            say(f"dsclip: rank {rank} failed:\n{traceback.format_exc()}")
    else:
        if rank == 0:
            _report(result, arguments)
        shutdown_distributed()
        if any(entry["state"] == "failed" for entry in result.get("entries", ())):
            sys.exit(1)
        return
    sys.stderr.flush()
    os._exit(code)  # the teardown would wait for ranks that may be elsewhere


def _parser() -> argparse.ArgumentParser:
    p = parser(
        "Evaluates a dsclip checkpoint, a run's newest checkpoint, a HuggingFace CLIP folder, or an OpenCLIP model.",
        EXAMPLE,
    )
    p.add_argument(
        "--model",
        required=True,
        help="checkpoint, run, HuggingFace CLIP folder, OpenCLIP folder or state dict, hf:NAME, openclip:NAME, or "
        "adapter:MODULE:FUNCTION for a model of another framework",
    )
    p.add_argument("--ema", action="store_true", help="of a checkpoint: the moving average of its weights (optim.ema)")
    p.add_argument("--task", choices=list(TASKS))
    add_suite_options(p)
    p.add_argument(
        "--feature-cache",
        help="folder where features are kept and looked for, or `none` (default: none; with --suite features/ below DSCLIP_CACHE)",
    )
    p.add_argument(
        "--feature-cache-gb", type=float, default=20, help="what that folder may take; old files give way (default: 20)"
    )
    p.add_argument(
        "--data",
        help="shards (a folder, glob, brace expression or address; demo:val), a folder or zip of images with captions.tsv or "
        "with a folder a class, a .tsv or .csv of pairs, a folder in CLIP_benchmark's layout, or datasets:NAME",
    )
    p.add_argument(
        "--split",
        help="of data that has several, such as train (default: the one that is held out: test, or else val)",
    )
    p.add_argument("--images", help="folder or zip with the images of a compositional set (default: near its JSON)")
    p.add_argument("--tokenizer", help="folder or hub name (default: the model's own)")
    add_task_options(p)
    p.add_argument(
        "--caption-key",
        default="caption",
        help="key of the captions in .json members, or a table's column (default: caption)",
    )
    p.add_argument("--negative-key", default=NEGATIVE_KEY, help="key of hard negatives in .json (default: negatives)")
    p.add_argument(
        "--group-key",
        help="key in .json of a sample's group, such as a region, or npy:I for the I-th number in .npy: zeroshot's worst group, "
        "bag_retrieval's bags",
    )
    p.add_argument("--batch-size", type=int, default=64, help="samples a forward and rank (default: 64)")
    p.add_argument(
        "--max-samples", type=int, help="evaluate on so many samples only: the first, of class folders in even steps"
    )
    p.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument(
        "--device-map", choices=["auto"],
        help="auto: for a model larger than a device: over all GPUs, then host memory, then files (default: one device a rank)",
    )  # fmt: skip
    p.add_argument(
        "--host-memory-gb",
        type=float,
        help="with --device-map: what weights may take in host memory (default: what is free)",
    )
    p.add_argument(
        "--offload-folder",
        type=Path,
        help="with --device-map: for weights that are read again and again (default: temporary)",
    )
    p.add_argument("--markdown", action="store_true", help="print a Markdown table")
    p.add_argument(
        "--output",
        type=Path,
        help="also write the JSON to this file, and the values of single samples beside it, for tools/compare.py; with --suite "
        "the folder of its results, which goes on where it was (default: runs/evaluations/SUITE/MODEL)",
    )
    add_remote(p)
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return p


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """{"task", "metrics", ...} of the model on the data, the same on every number of ranks, with a protocol on rank 0; of a suite, see `evaluate_suite`."""
    check_choice(arguments)
    if arguments.suite is None:
        _check_output(arguments)
    if arguments.json and arguments.markdown:
        raise UserError("--json and --markdown: give one of them")
    device, group = _join_ranks(arguments)
    offloads = arguments.device_map is not None and arguments.offload_folder is None
    with TemporaryDirectory(prefix="dsclip-offload-") if offloads else nullcontext("") as temporary:
        wanted = _wanted(arguments)
        model = open_model(wanted, device, group, Path(temporary))
        if arguments.suite is not None:

            def open_other(run: Path) -> OpenedModel:
                return open_model(replace(wanted, model=str(run), tokenizer=None), device, group, Path(temporary))

            return evaluate_suite(arguments, model, group, open_other)
        if arguments.feature_cache not in (None, NONE):
            store = feature_cache(arguments, model, group, in_suite=False)
            model = replace(model, embedder=replace(model.embedder, store=store))
        return _measure(arguments, model)


def _check_output(arguments: argparse.Namespace) -> None:
    if arguments.output and (arguments.output.is_dir() or not os.access(arguments.output.resolve().parent, os.W_OK)):
        raise UserError(f"--output {arguments.output}: no file can be written there")
    if arguments.output and arguments.output.suffix == ".safetensors":
        raise UserError(f"--output {arguments.output}: a result is JSON; give a name that ends with .json")


def _wanted(a: argparse.Namespace) -> Wanted:
    return Wanted(
        a.model, a.tokenizer, a.batch_size, a.dtype, a.device_map, a.host_memory_gb, a.offload_folder, average=a.ema
    )


def _measure(arguments: argparse.Namespace, model: OpenedModel) -> dict[str, Any]:
    storage = storage_of(arguments)

    def open_set(data: str, split: str | None, max_samples: int | None = None) -> EvalDataset:
        return build_eval_dataset(
            data,
            image_size=model.image_size,
            max_samples=max_samples,
            caption_key=arguments.caption_key,
            negative_key=arguments.negative_key,
            group_key=arguments.group_key,
            images=arguments.images,
            split=split,
            storage=storage,
            prepare=model.prepare,
        )

    kind, corruptions = TASKS[arguments.task], parse_corruptions(arguments.corruption or [])
    dataset = open_set(arguments.data, arguments.split, arguments.max_samples)
    check_keys(dataset, arguments.data, arguments.group_key, arguments.negative_key)
    options = task_options(arguments, kind, dataset, open_set, model.logit_scale)
    task: Task = kind.prepare(dataset, options)
    if corruptions:
        task = Corrupted(task, corruptions)
    images = sum(len(part.indices) for part in task.images)
    progress = EvaluationProgress({"images": images, "texts": len(task.texts)}, model.embedder.group.rank == 0)
    progress.begin(arguments.task, show=False)
    measured = measure_task(task, replace(model.embedder, embedded=progress.embedded, fitted=progress.fitted))
    progress.close()
    result = result_of(
        arguments.task, measured, dataset, model=arguments.model, data=arguments.data, train_shards=model.train_shards, storage=storage
    )  # fmt: skip
    if model.embedder.group.rank == 0:
        result["protocol"] = whole_protocol(model.protocol(), task, dataset, arguments.data)
        if arguments.output:
            write_result(arguments.output, result, measured)
    return result


def _join_ranks(arguments: argparse.Namespace) -> tuple[torch.device, Collectives]:
    rank, world_size, local_rank = launched_ranks()
    if arguments.local_rank is not None:
        local_rank = arguments.local_rank
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if world_size > 1:
        torch.distributed.init_process_group(ON_GPUS if cuda else "gloo")
    group = Collectives(rank, world_size)
    check_one_job(group)
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu"), group


def _report(result: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(result))
    elif arguments.suite is not None:
        print(suite_markdown(result) if arguments.markdown else suite_text(result))
    else:
        print(markdown([result]) if arguments.markdown else text(result))
