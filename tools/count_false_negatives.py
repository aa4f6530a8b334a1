"""Counts what `loss.filter_margin` leaves out: of planted duplicates, which it should, and of all other negatives.

On a laptop:     python tools/count_false_negatives.py runs/demo data/planted --margins -0.1 0 0.05
Train on them:   python launchers/train.py --config demo model.init=runs/demo data.train_shards=data/planted loss.filter_margin=0.05

Writes each of the demo's first 500 training pairs sixteen times, under 8,000 keys; `scene` in their .json says which are copies, and no
training looks at it. A batch of 256 has a copy of about every second pair, with another crop and, of several captions, another: a
false negative. Then it asks the model, of images against captions and the other way round. Shards that are there are taken as they are.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsclip import create_model
from dsclip.command_line import parser, run_tool
from dsclip.config.schema import DataSection
from dsclip.data import build_loader, load_tokenizer
from dsclip.data.shards.manifest import MANIFEST
from dsclip.data.shards.shard_set import open_shards
from dsclip.data.shards.writer import ShardWriter
from dsclip.data.sources.storage import Storage
from dsclip.datasets.demo import SHARD_SIZE, demo_folder
from dsclip.datasets.rewrite import whole_samples

SCENES, COPIES = 500, 16


def plant(folder: Path) -> None:
    """The demo's first pairs, each several times; nothing where they are written already."""
    if (folder / MANIFEST).exists():  # written last
        return
    storage = Storage()
    shards = open_shards(str(demo_folder() / "train"), storage)
    pairs = [sample.members for sample in itertools.islice(whole_samples(shards, storage), SCENES)]
    with ShardWriter(folder, SHARD_SIZE) as writer:
        for copy, (scene, members) in itertools.product(range(COPIES), enumerate(pairs)):
            text = json.loads(members["json"]) | {"scene": scene}
            writer.write(f"{copy:02d}{scene:04d}", members | {"json": json.dumps(text).encode()})


def count(image: Tensor, text: Tensor, keys: Tensor, margins: Sequence[float]) -> Tensor:
    """Of every margin, [4]: duplicates that stay negatives, duplicates, others that are left out, others; both directions.

    image, text [N, D]: unit rows. keys [N]: equal for duplicates.
    """
    similarity, own = image @ text.T, torch.eye(len(keys), dtype=torch.bool)
    same = (keys[:, None] == keys) & ~own
    others, found = ~same & ~own, torch.zeros(len(margins), 4, dtype=torch.int64)
    for row, margin in zip(found, margins, strict=True):
        for s in (similarity, similarity.T):
            left_out = s > s.diagonal()[:, None] - margin
            row += torch.stack([x.sum() for x in (same & ~left_out, same, others & left_out, others)])
    return found


def measure(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(counts of every margin, a table)."""
    plant(arguments.planted)
    model = create_model("auto", init=arguments.model).eval()
    data = DataSection(train_shards=str(arguments.planted), group_key="scene", workers=0, crop_scale=[0.9, 1.0])
    loader = build_loader(
        data, tokenizer=load_tokenizer("demo"), image_size=model.config.image_size, seed=arguments.seed,
        context_length=model.config.context_length, global_batch_size=arguments.batch,
    )  # fmt: skip
    total = torch.zeros(len(arguments.margins), 4, dtype=torch.int64)
    with torch.no_grad():
        for batch in itertools.islice(loader, arguments.batches):
            total += count(*model(batch.images, batch.tokens), batch.keys, arguments.margins)
    rows, lines = [], ["margin   duplicates that count as negatives   others that are left out"]
    for margin, (kept, planted, lost, others) in zip(arguments.margins, total.tolist(), strict=True):
        rows.append({"margin": margin, "kept": kept, "duplicates": planted, "left_out": lost, "others": others})
        lines.append(f"{margin:<8} {kept / planted:6.1%} of {planted:<26} {lost / others:6.2%} of {others}")
    return {"margins": rows}, "\n".join(lines)


def main() -> None:
    """Parses, runs, exits with 0, 1 or 2."""
    p = parser(
        "Counts what loss.filter_margin leaves out, of planted duplicates and of other negatives.",
        "python tools/count_false_negatives.py runs/demo data/planted",
    )
    p.add_argument("model", metavar="MODEL", help="run, checkpoint or folder, with the demo's tokenizer")
    p.add_argument(
        "planted", metavar="SHARDS", type=Path, help="folder of the planted duplicates; written where it is not there"
    )
    p.add_argument(
        "--margins", type=float, nargs="+", default=[-0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1], help="of the filter"
    )
    p.add_argument("--batch", type=int, default=256, help="pairs (default: 256)")
    p.add_argument("--batches", type=int, default=8, help="(default: 8)")
    p.add_argument("--seed", type=int, default=7, help="of the order (default: 7)")
    sys.exit(run_tool(measure, p.parse_args()))


if __name__ == "__main__":
    main()
