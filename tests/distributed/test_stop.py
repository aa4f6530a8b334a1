"""A whole job that is signalled, under the real launcher: saved, and no process of it left."""

import re
import signal

import pytest

from dsclip.checkpoint.manifest import verify
from tests.distributed.launch import SMALL, deepspeed_with_a_signal


@pytest.mark.parametrize("to, code", [("runner", -signal.SIGTERM), ("launch", 1), ("rank 1", 75)])
def test_a_signal_to_the_launcher_or_a_rank_ends_the_job_saved_and_leaves_no_process(demo, tmp_path, to, code):
    options = [
        *SMALL,
        "train.steps=5000",
        "data.workers=2",
        f"train.output={tmp_path}",
        "train.name=stopped",
        "train.save_every=null",
        "eval.every_steps=null",
    ]
    run = tmp_path / "stopped"
    ended = deepspeed_with_a_signal(*options, to=to, once=run / "metrics.jsonl")
    assert ended.returncode == code, ended.stdout
    assert "Traceback" not in ended.stdout
    [saved] = (run / "checkpoints").iterdir()
    step = verify(saved)["step"]
    assert ended.stdout.count(f"after step {step} of 5000, which is saved in {saved}. Go on with the same command") == 1


def test_when_a_rank_dies_the_others_end_and_say_which_and_of_what(demo, tmp_path):
    options = [*SMALL, "train.steps=5000", f"train.output={tmp_path}", "train.name=run", "eval.every_steps=null"]
    ended = deepspeed_with_a_signal(
        *options, to="rank 1", number=signal.SIGKILL, once=tmp_path / "run" / "metrics.jsonl"
    )
    assert ended.returncode != 0 and "Traceback" not in ended.stdout, ended.stdout
    assert re.search(
        r"dsclip: rank 1 \(process \d+\) (was killed by SIGKILL, as the system|has died)", ended.stdout
    ), (  # fmt: skip
        ended.stdout
    )
