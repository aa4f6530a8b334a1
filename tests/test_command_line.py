"""Every tool answers with --json on errors too, and a training says which recipe it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsclip.command_line import parser, run_tool
from dsclip.errors import RunFailed, UserError
from dsclip.train.cli import parse_arguments, without_config
from tests.programs import run_program

ROOT = Path(__file__).parent.parent
WRONG = {
    "tools/plan.py": "--gpu B9000",
    "tools/make_shards.py": "nowhere.zip OUT",
    "tools/check_data.py": "nowhere",
    "tools/compare.py": "nowhere.json nowhere.json",
    "tools/implant_backdoor.py": "nowhere OUT --target cat --share 0.1",
    "tools/reinforce_shards.py": "nowhere OUT",
    "tools/index_shards.py": "nowhere",
    "tools/soup.py": "nowhere nowhere --out OUT",
    "tools/verify_checkpoint.py": "nowhere",
    "tools/compose.py": "nowhere --add nowhere --out OUT",
    "tools/convert.py": "nowhere OUT --to openclip",
    "tools/convert_hf.py": "nowhere OUT",
    "tools/bench_data.py": "--shards nowhere",
    "tools/bench_loss.py": "--n 0",
    "tools/bench_captions.py": "--batch 0",
    "tools/bench_convert.py": "--folder nowhere --ranks 0",
    "tools/bench_step.py": "--preset no-such",
    "tools/make_reference.py": "nowhere/page.md",
    "launchers/evaluate.py": "--model nowhere --task zeroshot --data demo:val",
}


def start(*arguments: str) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, **pipes)


def test_every_tool_prints_its_errors_as_json_when_asked(tmp_path):
    alone = "launchers/evaluate.py"  # which ends its process
    process = start(alone, *WRONG[alone].split(), "--json")
    ended = {
        program: run_program(program, *text.replace("OUT", str(tmp_path / "out")).split(), "--json")
        for program, text in WRONG.items()
        if program != alone
    }
    output, log = process.communicate(timeout=300)
    ended[alone] = subprocess.CompletedProcess(alone, process.returncode, output, log)
    for program, done in ended.items():
        assert done.returncode == 2, (program, done.stderr)
        found = json.loads(done.stdout)
        assert found["exit_code"] == 2 and len(found["error"]) > 10, program
        assert found["error"] in done.stderr and "Traceback" not in done.stderr, (program, done.stderr)


def test_wrong_arguments_are_json_too(capsys):
    with pytest.raises(SystemExit) as left:
        parser("", "").parse_args(["--json", "--no-such"])
    out, err = capsys.readouterr()
    assert left.value.code == 2 and "usage:" in err
    assert json.loads(out) == {"error": "unrecognized arguments: --no-such", "exit_code": 2}
    with pytest.raises(SystemExit):
        parser("", "").parse_args(["--no-such"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("too small"), 2, "too small"),
        (RunFailed("came to nothing"), 1, "came to nothing"),
        (ZeroDivisionError("by zero"), 1, "ZeroDivisionError: by zero"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (FileNotFoundError(2, "No such file", "x.tar"), 2, "x.tar: No such file"),
    ],
)
def test_each_way_to_fail_has_its_exit_code_in_the_object(capsys, error, code, sentence):
    def tool(_):
        raise error

    for given in ([], ["--json"]):
        assert run_tool(tool, parser("", "").parse_args(given)) == code
        out, err = capsys.readouterr()
        assert out == "" if not given else json.loads(out) == {"error": sentence, "exit_code": code}
        assert ("Traceback" in err) == isinstance(error, ZeroDivisionError)


def test_a_misspelt_option_is_answered_with_the_right_one(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--resum", "auto"])
    assert end.value.code == 2
    assert "unrecognized arguments: --resum" in (said := capsys.readouterr().err)
    assert "Did you mean `--resume`?" in said


def test_a_training_without_a_recipe_says_that_it_is_the_demos():
    assert without_config(["optim.lr=1"]).startswith("no --config is given: the recipe is `demo`")
    text = without_config(["data.train_shards=mine", "train.steps=5"])
    assert text.startswith("WARNING: no --config") and "data.tokenizer" in text and "train.steps" not in text
    process = start("launchers/train.py", "data.train_shards=nowhere")
    output, log = process.communicate(timeout=200)
    assert process.returncode == 2 and "WARNING: no --config is given" in log and "nowhere" in log.splitlines()[-1]


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `tool | head -1`."""
    command = [sys.executable, "tools/plan.py", "--preset", "demo", "--gpu", "H100"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 0)
