"""The command line of `launchers/train.py`: parse, run, and leave with an exit code that means something."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from dsclip.command_line import Parser
from dsclip.distributed import launched_ranks, shutdown_distributed, take_slurm_ranks
from dsclip.errors import RunStopped, UserError
from dsclip.train.accelerate_launch import refuse_without_effect
from dsclip.train.lost_reader import outlive_readers
from dsclip.train.processes import launchers

EXAMPLES = """examples:
  deepspeed launchers/train.py --ds_config ds_configs/zero3_bf16.json
  deepspeed launchers/train.py --ds_config ds_configs/zero3_bf16.json --config my.yaml train.name=b32 optim.lr=1e-3
  deepspeed launchers/train.py --ds_config ds_configs/zero3_bf16.json train.name=b32 --resume auto

exit codes: 0 done, 1 failed, 2 wrong input (one sentence says what to change), 3 numbers that are not finite, 4 no progress for
train.hang_timeout, 75 stopped by a signal and saved"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Options and `section.key=value` overrides, in any order."""
    parser = Parser(
        description="Trains a CLIP model with DeepSpeed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ds_config", "--ds-config", default="zero3_bf16",
        help="how to run: a DeepSpeed JSON, or the name of one in ds_configs/ (default: zero3_bf16)",
    )  # fmt: skip
    parser.add_argument(
        "--config", help="what to train: a packaged recipe or a YAML file (default: demo, the embedded data set's)"
    )
    parser.add_argument(
        "--resume", default="none", metavar="auto|none|PATH",
        help="auto: continue this run's newest checkpoint, if it has one; PATH: continue from that checkpoint",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, train nothing")
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS
    )  # from launchers
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override a key of the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the command and ends the process: a rank that fails must not wait for the others' collectives."""
    arguments = parse_arguments(argv)
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages for torch's large CPU tensors
    rank = code = 0
    outlive_readers()
    try:
        take_slurm_ranks()
        launchers()  # now: one that ends while the run is built is noticed later
        rank = launched_ranks()[0]
        if arguments.config is None:
            arguments.config = "demo"
            if rank == 0:
                print(f"dsclip: {without_config(arguments.overrides)}", file=sys.stderr, flush=True)
        import torch

        from dsclip.train.run import run

        refuse_without_effect(os.environ, on_gpu=torch.cuda.is_available())
        try:
            run(arguments)
        except RunStopped as stopped:
            code = stopped.exit_code
            if rank == 0:
                print(f"dsclip: {stopped}", file=sys.stderr)
        shutdown_distributed()
        if code:
            sys.exit(code)
        return
    except UserError as error:
        code = error.exit_code
        print(f"dsclip: {error}" if rank == 0 else f"dsclip: rank {rank} stopped: {error}", file=sys.stderr)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        code = 130
        if rank == 0:
            print("dsclip: interrupted; continue with --resume auto", file=sys.stderr)
    except BaseException:
        code = 1
        print(f"dsclip: rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without the teardown that needs the other ranks; the launcher stops those


def without_config(overrides: list[str]) -> str:
    """What a run without --config trains: said, because its sizes are the demo's, also with shards of one's own."""
    text = "no --config is given: the recipe is `demo`, a small model for the embedded data set"
    keys = {override.partition("=")[0] for override in overrides}
    if "data.train_shards" not in keys:
        return f"{text}."
    left = ["model.preset", "batch.global_batch_size", "train.steps", "data.tokenizer", "eval.zeroshot_shards"]
    kept = ", ".join(key for key in left if key not in keys)
    return (
        f"WARNING: {text}, and `data.train_shards` alone is yours: {kept or 'all else'} and more stay the demo's. "
        "tools/make_shards.py writes a recipe for a data set; give it with --config."
    )
