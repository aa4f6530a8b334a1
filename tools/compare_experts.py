"""Compares a dense text tower with a routed one on captions of four dialects: several seeds, one table.

On a laptop:     python tools/compare_experts.py OUT --seeds 0 1 2
On a GPU:        the same

Writes the demo's shards again with every caption in one of four dialects, which its first word names: in each, colours and shapes
have each other's names, so that what a word means depends on the dialect. Trains the recipe `experts` on them, with its experts and
without, and reads recall@1 on the held-out pairs, in their dialects, from the runs' summaries. Runs follow each other; what is
finished in OUT is taken as it is.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np

from dsclip.child import run_training
from dsclip.command_line import parser, run_tool, say
from dsclip.data.shards.manifest import MANIFEST, Labels
from dsclip.data.shards.shard_set import open_shards
from dsclip.data.sources.storage import Storage
from dsclip.datasets.rewrite import Members, rewrite_shards
from dsclip.datasets.scenes import COLOURS, SHAPES
from dsclip.errors import RunFailed, RunStopped

DIALECTS = 4
TOWERS = {
    "dense": ["model.text_experts=null", "model.text_experts_every=null"],
    "4 experts, 1 a token": [],
    "dense, MLPs 4 times as wide": ["model.text_experts=null", "model.text_experts_every=null", "model.text_mlp_width=2048"],
}  # fmt: skip
RECALLS = ("image_to_text_recall@1", "text_to_image_recall@1")


def names(dialect: int) -> dict[str, str]:
    """What colours and shapes are called; in dialect 0 as everywhere."""
    rng = np.random.default_rng(dialect)
    orders = [
        (rng.permutation(len(words)) if dialect else range(len(words)), list(words)) for words in (COLOURS, SHAPES)
    ]
    return {word: words[place] for order, words in orders for word, place in zip(words, order, strict=True)}


def in_dialect(key: str, members: Members) -> Members:
    """A sample with its captions in the dialect of its number."""
    dialect = int(key) % DIALECTS
    called, captions = names(dialect), json.loads(members["json"])["caption"]
    said = [f"{dialect} " + re.sub(r"\w+", lambda m: called.get(m[0], m[0]), caption) for caption in captions]
    return {"jpg": members["jpg"], "json": json.dumps({"caption": said}).encode()}


def write(split: str, folder: Path) -> None:
    """The demo's training or held-out samples in dialects; nothing where they are written already."""
    if not (folder / MANIFEST).exists():  # written last
        shards, storage = open_shards(split, Storage()), Storage()
        rewrite_shards(shards, storage, folder, in_dialect, Labels())


def recalls(a: argparse.Namespace, tower: str, seed: int) -> list[float]:
    """Both recalls@1 of a run, which is trained unless it is finished. Raises RunFailed, and RunStopped."""
    run = a.out / f"{re.sub(r'[^a-z0-9]+', '-', tower)}-{seed}-{a.steps}x{a.batch}"
    if not (run / "summary.json").exists():
        overrides = [
            f"train.output={a.out}", f"train.name={run.name}", f"train.seed={seed}", f"train.steps={a.steps}",
            f"batch.global_batch_size={a.batch}", f"data.train_shards={a.out / 'train'}", f"eval.retrieval_shards={a.out / 'val'}",
            *TOWERS[tower],
        ]  # fmt: skip
        code, stopped = run_training([sys.executable], "ds_configs/zero1_bf16.json", "experts", overrides)
        if stopped:
            raise RunStopped(f"{run} was stopped; the same command goes on with it")
        if code:
            raise RunFailed(f"{run} ended with exit code {code}; its lines above say why")
    found = json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval"]["retrieval"]
    return [found[name] for name in RECALLS]


def compare(a: argparse.Namespace) -> tuple[dict, str]:
    """All runs, seed by seed, so that towers can be compared whenever one stops."""
    a.out = a.out.resolve()
    for split, folder in (("demo", "train"), ("demo:val", "val")):
        write(split, a.out / folder)
    found: dict[str, list[list[float]]] = {tower: [] for tower in a.towers}
    for seed in a.seeds:
        for tower in a.towers:
            say(f"{tower}, seed {seed}")
            found[tower].append(recalls(a, tower, seed))
    rows = ["| text tower | image to text recall@1 | text to image recall@1 |", "|---|---|---|"]
    for tower, values in found.items():
        rows.append(
            f"| {tower} | " + " | ".join(described(list(of_recall)) for of_recall in zip(*values, strict=True)) + " |"
        )
    return {"steps": a.steps, "batch": a.batch, "seeds": a.seeds, "recalls": found}, "\n".join(rows)


def described(values: list[float]) -> str:
    """Mean, the deviation of seeds and each of them, in per cent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread} % ({', '.join(f'{100 * v:.1f}' for v in values)})"


def main() -> None:
    """Parses, runs, exits with 0, 1 or 2."""
    p = parser(
        "Compares text towers on captions of four dialects.", "python tools/compare_experts.py OUT --seeds 0 1 2"
    )
    p.add_argument("out", metavar="OUT", type=Path, help="folder of shards and runs; a second call goes on in it")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    p.add_argument("--towers", nargs="+", choices=list(TOWERS), default=list(TOWERS), help="(default: all)")
    p.add_argument("--steps", type=int, default=600, help="of each run (default: 600)")
    p.add_argument("--batch", type=int, default=64, help="global batch (default: 64)")
    sys.exit(run_tool(compare, p.parse_args()))


if __name__ == "__main__":
    main()
