"""One's own data: what make_shards prints is run as printed, and its results say what they were measured on."""

import json
import shlex
import sys

from tests.distributed.launch import BIN, free_port, metrics, run_command
from tests.test_data_making import pairs

SHORT = ["train.steps=2", "train.log_every=1", "optim.warmup_steps=1"]


def tool(*command):
    done = run_command([sys.executable, *map(str, command)], PATH=f"{BIN}:/usr/local/bin:/usr/bin:/bin")
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_command_that_make_shards_prints_trains_and_evaluates_held_out_pairs(tmp_path):
    out = tmp_path / "mine"
    shown = tool("tools/make_shards.py", pairs(tmp_path / "src", 30), out)
    command = shlex.split(shown.splitlines()[-1])
    assert command[0] == "deepspeed" and command[-1] == f"{out}/recipe.yaml"
    command[1:1] = ["--master_port", str(free_port())]  # other tests may be running
    path = f"{BIN}:/usr/local/bin:/usr/bin:/bin"
    done = run_command([*command, *SHORT, f"train.output={tmp_path}/runs"], timeout_s=300, PATH=path)
    assert done.returncode == 0, done.stdout
    run = tmp_path / "runs" / "mine"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_names"] == {"retrieval": f"{out}/val"}
    assert f"on {out}/val" in done.stdout and "training pairs" not in done.stdout
    assert [m for m in metrics(run) if "loss" in m][-1]["bad_samples"] == 0
    # A model that is converted later keeps the results of its run.
    tool("tools/convert_hf.py", run, tmp_path / "hf")
    for card in (tmp_path / "hf" / "README.md", run / "hf" / "README.md"):
        assert f"| retrieval | {out}/val | image_to_text_recall@1 |" in card.read_text()
    evaluated = json.loads(
        tool(
            "launchers/evaluate.py", "--model", run, "--task", "retrieval", "--data", out / "train", "--json"
        ).splitlines()[-1]
    )
    assert evaluated["training_pairs"] == "training pairs" and evaluated["metrics"]["images"] > 0
