"""tools/verify_checkpoint.py: a run's checkpoints, each whole or named with what is wrong."""

import json
import shutil

from tests.programs import run_program
from tests.test_checkpoint_manifest import change, checkpoint  # noqa: F401


def verify_in(*paths):
    done = run_program("tools/verify_checkpoint.py", *paths, "--json")
    return done.returncode, json.loads(done.stdout)


def test_all_checkpoints_of_a_run_are_compared_and_damaged_ones_named(checkpoint, tmp_path):  # noqa: F811
    folder = tmp_path / "run" / "checkpoints"
    for step in (3, 4):
        shutil.copytree(checkpoint, folder / f"step_{step:08d}")
    change(folder / "step_00000004", step=4)
    code, found = verify_in(tmp_path / "run")
    assert code == 0 and [row["step"] for row in found["checkpoints"]] == [3, 4]
    size = sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file() and p.name != "dsclip.json")
    assert {(row["files"], row["bytes"]) for row in found["checkpoints"]} == {(2, size)}
    assert verify_in(folder / "step_00000003", folder / "step_00000004") == (code, found)

    victim = next((folder / "step_00000004").glob("deepspeed/*.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    code, found = verify_in(tmp_path / "run")
    assert code == 1 and f"step_00000004 is damaged: deepspeed/{victim.name} has changed" in found["error"]
    assert found["error"].endswith(f"Whole: {folder / 'step_00000003'}.")


def test_a_folder_without_checkpoints_is_wrong_input(tmp_path):
    code, found = verify_in(tmp_path)
    assert code == 2 and "is no checkpoint and holds none" in found["error"]
