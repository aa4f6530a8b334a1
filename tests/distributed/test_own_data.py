"""One's own data: what make_shards prints is run as printed, and its results say what they were measured on."""

import json
import shlex

import pytest

from dsclip.convert.cli import main as convert_command
from dsclip.datasets.cli import main as make_shards_command
from dsclip.evaluate.cli import main as evaluate_command
from tests.distributed.launch import BIN, free_port, run_command, steps
from tests.test_datasets_make import pairs

SHORT = ["train.steps=2", "train.log_every=1", "optim.warmup_steps=1"]


def test_the_command_that_make_shards_prints_trains_and_evaluates_held_out_pairs(tmp_path, capsys):
    out, run = tmp_path / "mine", tmp_path / "runs" / "mine"
    with pytest.raises(SystemExit):
        make_shards_command([str(pairs(tmp_path / "src", 30)), str(out)])
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    command = [word for word in words if "=" not in word]  # without OMP_NUM_THREADS=1, which the tests set
    assert command[0] == "deepspeed" and command[-1] == f"{out}/recipe.yaml"
    command[1:1] = ["--master_port", str(free_port())]  # other tests may be running
    path = f"{BIN}:/usr/local/bin:/usr/bin:/bin"
    done = run_command([*command, *SHORT, f"train.output={tmp_path}/runs"], timeout_s=300, PATH=path)
    assert done.returncode == 0, done.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_names"] == {"retrieval": f"{out}/val"}
    assert f"on {out}/val" in done.stdout and "training pairs" not in done.stdout
    assert steps(run)[-1]["bad_samples"] == 0

    # A model that is converted later keeps the results of its run.
    with pytest.raises(SystemExit) as converted:
        convert_command([str(run), str(tmp_path / "hf"), "--to", "hf"])
    assert converted.value.code == 0
    for card in (tmp_path / "hf" / "README.md", run / "hf" / "README.md"):
        assert f"| retrieval | {out}/val | image_to_text_recall@1 |" in card.read_text()

    capsys.readouterr()
    for model in (run, tmp_path / "hf"):
        evaluate_command(["--model", str(model), "--task", "retrieval", "--data", str(out / "train")])
        assert f"retrieval of {model} on {out}/train (training pairs)" in capsys.readouterr().out
