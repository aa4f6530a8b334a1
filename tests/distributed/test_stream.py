"""A run on plain tars without manifest or index, in webdataset's order, and its resume."""

import shutil

from tests.distributed.launch import SMALL, losses, steps, train
from tests.shard_files import sample, write_set, write_tar

OFF = [
    "eval.zeroshot_shards=null",
    "eval.retrieval_shards=null",
    "eval.hard_negatives_shards=null",
    "eval.every_steps=null",
]


def test_two_ranks_train_from_plain_tars_and_continue_at_the_shard(demo, tmp_path):
    shards = write_set(tmp_path / "plain", 7, 20)
    write_tar(shards / "007.tar", {f"{i:05d}": sample(140 + i) | ({"jpg": b"x"} if i == 3 else {}) for i in range(20)})
    options = [
        *SMALL, *OFF, f"train.output={tmp_path}", f"data.train_shards={shards}", "data.order=stream", "data.workers=1",
        "data.shuffle_window=8", "train.save_every=2", "train.keep_checkpoints=9", "train.export_hf=false",
        "data.max_bad_fraction=0.5", "--resume", "auto",
    ]  # fmt: skip
    first = train(*options)
    assert first.returncode == 0, first.stdout
    assert "data.order=stream: shards are read from end to end" in first.stdout
    run = tmp_path / "demo"
    whole = steps(run)
    assert len(losses(run)) == 6 and whole[-1]["bad_samples/undecodable image"] >= 1
    assert 1.0 <= whole[-1]["epoch"] <= 6 * 32 / 160 and not list(shards.glob("*.idx"))
    for step in (6, 4):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    again = train(*options)
    assert again.returncode == 0, again.stdout
    assert "continued from" in again.stdout and "unfinished ones again from their beginning" in again.stdout
    resumed = {m["step"]: m for m in steps(run)}
    assert sorted(resumed) == [1, 2, 3, 4, 5, 6] and resumed[2]["batch_hash"] == whole[1]["batch_hash"]
    refused = train(*options, ranks=1)
    assert refused.returncode != 0 and "Traceback" not in refused.stdout
    few = train(*options, "data.workers=5", "train.name=few")
    assert "there are 8; set data.workers to 4 or less" in few.stdout
