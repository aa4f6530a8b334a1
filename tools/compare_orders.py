"""Compares the orders of data by what a model learns: the demo with one caption an image, several seeds, one table.

On a laptop:     python tools/compare_orders.py OUT --seeds 0 1 2 3 4
On a GPU:        the same; add --ranks 4 for several
With OpenCLIP:   add --open_clip PEER/bin/python, of an environment as tools/open_clip_training.py says

Writes the demo's training shards again with the first caption of each image alone (.jpg and .txt), trains the demo's recipe on
them in every order and seed, and sums zero-shot top-1 and both recalls@1 on the demo's held-out pairs, all by
launchers/evaluate.py in fp32. Runs follow each other; what is finished in OUT is taken as it is and an interrupted run
continues, so that a second call goes on where the first was stopped. OUT belongs to one version of dsclip: for before and
after, use two checkouts with an OUT each.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from dsclip.command_line import parser, run_tool, say
from dsclip.data.shards.manifest import MANIFEST
from dsclip.data.shards.writer import ShardWriter
from dsclip.datasets.demo import SHARD_SIZE, demo_folder
from dsclip.errors import RunFailed

ROOT = Path(__file__).parent.parent
ORDERS = {"epoch": "data.resampled=false", "resampled": "data.resampled=true"}
Trainer = Callable[[argparse.Namespace, str, int], Path]  # (arguments, order, seed) to a folder that evaluate.py reads


def write_one_caption(folder: Path) -> None:
    """The demo's training samples, each with the first of its captions as .txt; nothing where they are written already."""
    if (folder / MANIFEST).exists():  # written last
        return
    with ShardWriter(folder, SHARD_SIZE) as writer:
        for shard in sorted((demo_folder() / "train").glob("*.tar")):
            with tarfile.open(shard) as tar:
                members = {m.name: tar.extractfile(m).read() for m in tar}
            for name, content in members.items():
                key, _, extension = name.partition(".")
                if extension == "jpg":
                    caption = json.loads(members[f"{key}.json"])["caption"][0]
                    writer.write(key, {"jpg": content, "txt": caption.encode()})


def train(a: argparse.Namespace, order: str, seed: int) -> Path:
    """The folder of a run, which is trained unless it is finished. Raises RunFailed."""
    run = a.out / f"{order}-{seed}-{a.steps}x{a.batch}"
    if not (run / "summary.json").exists():
        write_one_caption(a.out / "one_caption")
        start(
            run,
            ["deepspeed", "--master_port", str(a.master_port), "--num_gpus", str(a.ranks), "launchers/train.py",
             "--ds_config", a.ds_config, "--config", "demo", "--resume", "auto", f"train.output={a.out}", f"train.name={run.name}",
             f"data.train_shards={a.out / 'one_caption'}", "data.tokenizer=demo", ORDERS[order], f"train.seed={seed}",
             f"train.steps={a.steps}", f"batch.global_batch_size={a.batch}", f"eval.every_steps={a.steps}"],
        )  # fmt: skip
    return run


def train_open_clip(a: argparse.Namespace, order: str, seed: int) -> Path:
    """The same of OpenCLIP; a run that was interrupted begins again."""
    out = a.out / f"open_clip-{order}-{seed}-{a.steps}x{a.batch}-{a.precision}"
    if not (out / "open_clip_config.json").exists():
        write_one_caption(a.out / "one_caption")
        shards = sorted((a.out / "one_caption").glob("*.tar"))
        pattern = f"{shards[0].parent}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
        start(
            out,
            [a.open_clip, "tools/open_clip_training.py", str(out), "--shards", pattern, "--tokenizer", str(demo_folder() / "tokenizer"),
             "--seed", str(seed), "--steps", str(a.steps), "--batch", str(a.batch), "--precision", a.precision,
             *(["--resampled"] if order == "resampled" else [])],
        )  # fmt: skip
    return out


def start(out: Path, command: list[str]) -> None:
    """Runs a training from the checkout, whose package the peer's interpreter needs too. Raises RunFailed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, env=environment)
    if done.returncode:
        raise RunFailed(f"{out} ended with exit code {done.returncode}; its lines above say why")


def score(model: Path) -> float:
    """Zero-shot top-1 and both recalls@1 on the demo's held-out pairs, summed; kept beside the model."""
    kept = model / "score.json"
    if not kept.exists():
        metrics: dict[str, float] = {}
        for task in ("zeroshot", "retrieval"):
            command = [
                sys.executable,
                "launchers/evaluate.py",
                "--model",
                str(model),
                "--task",
                task,
                "--data",
                "demo:val",
            ]
            done = subprocess.run([*command, "--dtype", "fp32", "--json"], cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RunFailed(f"the evaluation of {model} failed: {done.stdout.strip() or done.stderr.strip()}")
            metrics |= json.loads(done.stdout)["metrics"]
        kept.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))
    return sum(found[name] for name in ("top1", "image_to_text_recall@1", "text_to_image_recall@1"))


def described(scores: list[float]) -> dict:
    """Mean and its standard error, which a single run doesn't have."""
    error = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return {"scores": scores, "mean": statistics.fmean(scores), "standard_error": error}


def compare(a: argparse.Namespace) -> tuple[dict, str]:
    """All runs, seed by seed, so that orders can be compared whenever one stops."""
    a.out = a.out.resolve()
    trainers: dict[str, Trainer] = {"dsclip": train} | ({"OpenCLIP": train_open_clip} if a.open_clip else {})
    scores: dict[str, list[float]] = {f"{name}, {order}": [] for order in a.orders for name in trainers}
    started = time.monotonic()
    runs = [(name, order, seed) for seed in a.seeds for order in a.orders for name in trainers]
    for number, (name, order, seed) in enumerate(runs):
        left = (time.monotonic() - started) / number * (len(runs) - number) / 60 if number else math.nan
        say(
            f"run {number + 1} of {len(runs)}: {name}, {order}, seed {seed}"
            + (f"; about {left:.0f} min left" if number else "")
        )
        scores[f"{name}, {order}"].append(score(trainers[name](a, order, seed)))
    found = {order: described(values) for order, values in scores.items()}
    rows = ["| order | " + " | ".join(f"seed {seed}" for seed in a.seeds) + " | mean ± standard error |"]
    rows.append("|---" * (len(a.seeds) + 2) + "|")
    for order, row in found.items():
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.3f}"
        rows.append(f"| {order} | " + " | ".join(f"{s:.3f}" for s in row["scores"]) + f" | {row['mean']:.3f}{error} |")
    return {"steps": a.steps, "batch": a.batch, "seeds": a.seeds, "orders": found}, "\n".join(rows)


def main() -> None:
    """Parses, runs, exits with 0, 1 or 2."""
    p = parser(
        "Compares the orders of data by what a model learns.", "python tools/compare_orders.py OUT --seeds 0 1 2"
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder of shards and runs; a second call goes on in it")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: 0 1 2 3 4)")
    p.add_argument("--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS), help="(default: both)")
    p.add_argument("--steps", type=int, default=500, help="of each run (default: 500)")
    p.add_argument("--batch", type=int, default=256, help="global batch (default: 256)")
    p.add_argument("--ds_config", "--ds-config", default="ds_configs/zero3_bf16.json", help="as of launchers/train.py")
    p.add_argument("--ranks", type=int, default=1, help="processes of a run (default: 1)")
    p.add_argument(
        "--open_clip", metavar="PYTHON", help="interpreter with OpenCLIP, whose own loop runs beside dsclip's"
    )
    p.add_argument("--precision", choices=["fp32", "amp_bf16"], default="fp32", help="of OpenCLIP (default: fp32)")
    p.add_argument("--master_port", type=int, default=29500, help="as of deepspeed (default: 29500)")
    sys.exit(run_tool(compare, p.parse_args()))


if __name__ == "__main__":
    main()
