"""The tools that check dsclip itself: the mutation check, the figure of the layers, and the comparison of orders."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.programs import ROOT, run_program
from tools import count_false_negatives, draw_layers, mutate


def test_every_mutant_changes_one_line_that_a_seed_chooses():
    found = mutate.mutants("dsclip/losses/masks.py", 10, 0)
    assert [m.line for m, _ in found] == [m.line for m, _ in mutate.mutants("dsclip/losses/masks.py", 10, 0)]
    assert len({m.line for m, _ in found}) == 10
    whole = ast.unparse(ast.parse((mutate.ROOT / "dsclip/losses/masks.py").read_text())).splitlines()
    for mutation, broken in found:
        compile(broken, mutation.module, "exec")
        assert sum(a != b for a, b in zip(whole, broken.splitlines(), strict=True)) == 1, mutation


def test_every_operator_breaks_what_it_names():
    source = "def f(a, b):\n    f(a, b)\n    return a < b and -a + 1\n"
    tree = ast.parse(source)
    kinds = {kind for place in mutate.places(tree) for kind, _ in mutate.changes(mutate.child_of(*place))}
    assert kinds == {"comparison", "arithmetic", "constant", "swapped", "negated"}
    assert any(mutate.droppable(mutate.child_of(*place)) for place in mutate.places(tree))


OUTCOMES = """
import sys
from pathlib import Path
from tools import mutate

checkout, outcomes = Path(sys.argv[1]), []
for body, timeout_s in (("assert double(2) == 4", 120), ("assert double(2) == 5", 120), ("while True: pass", 3)):
    test = f"import sys\\nsys.path.insert(0, {str(checkout)!r})\\nfrom broken import double\\ndef test_it():\\n    {body}\\n"
    (checkout / "tests" / "test_broken.py").write_text(test)
    outcomes.append(mutate.run_tests(checkout, ["tests/test_broken.py"], timeout_s))
print(*outcomes)
"""


def test_a_break_is_caught_survives_or_hangs(tmp_path):
    """In a process of its own, as the tool runs: a fork of this one would wait for threads that other tests have left in it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "broken.py").write_text("def double(x):\n    return 2 * x\n")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", OUTCOMES, tmp_path], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["survived", "caught", "hung"], done.stderr


def test_an_import_that_runs_back_up_is_drawn_in_red():
    figure, back_up = draw_layers.draw([["top"], ["left", "right"]], {("top", "left"): 3, ("right", "top"): 1})
    assert back_up == ["right imports top (1)"]
    assert figure.count('class="arrow up"') == 1 and figure.count('class="arrow"') == 1
    assert "beside left" in figure


def test_finished_runs_are_not_trained_again(tmp_path):
    for order, top1 in (("epoch", [0.5, 0.7]), ("resampled", [0.6, 0.6])):
        for seed in (0, 1):
            run = tmp_path / f"{order}-{seed}-500x256"
            run.mkdir()
            (run / "summary.json").write_text("{}")
            metrics = {"top1": top1[seed], "image_to_text_recall@1": 0.25, "text_to_image_recall@1": 0.5}
            (run / "score.json").write_text(json.dumps(metrics))
    done = run_program("tools/compare_orders.py", str(tmp_path), "--seeds", "0", "1", "--json")
    found = json.loads(done.stdout)["orders"]
    assert found["dsclip, epoch"]["scores"] == pytest.approx([1.25, 1.45])
    assert found["dsclip, epoch"]["mean"] == pytest.approx(1.35) and found["dsclip, epoch"][
        "standard_error"
    ] == pytest.approx(0.1)
    assert found["dsclip, resampled"]["standard_error"] == pytest.approx(0) and "run 4 of 4" in done.stderr
    assert not (tmp_path / "one_caption").exists()


def test_false_negatives_are_counted_as_the_filter_leaves_entries_out():
    image, text = torch.eye(3), torch.eye(3)
    text[1], text[2] = torch.tensor([0.96, 0.28, 0.0]), torch.tensor([0.6, 0.0, 0.8])
    # The similarities are [1, 0.96, 0.6], [0, 0.28, 0] and [0, 0, 0.8]; the first two pairs are copies.
    found = count_false_negatives.count(image, text, torch.tensor([5, 5, 9]), [-1.0, 0.0, 0.05, 0.3])
    assert found.tolist() == [[4, 4, 0, 8], [3, 4, 0, 8], [2, 4, 0, 8], [1, 4, 3, 8]]
