"""The tools that check dsclip itself: the mutation check, and the figure of the layers."""

import ast
import textwrap

from tools import draw_layers, mutate


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


def test_a_break_is_caught_survives_or_hangs(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "broken.py").write_text("def double(x):\n    return 2 * x\n")
    test = tmp_path / "tests" / "test_broken.py"
    outcomes = []
    for body, timeout_s in (("assert double(2) == 4", 120), ("assert double(2) == 5", 120), ("while True: pass", 3)):
        test.write_text(
            textwrap.dedent(f"""
            import sys
            sys.path.insert(0, {str(tmp_path)!r})
            from broken import double
            def test_it():
                {body}
        """)
        )
        outcomes.append(mutate.run_tests(tmp_path, ["tests/test_broken.py"], timeout_s))
    assert outcomes == ["survived", "caught", "hung"]


def test_an_import_that_runs_back_up_is_drawn_in_red():
    figure, back_up = draw_layers.draw([["top"], ["left", "right"]], {("top", "left"): 3, ("right", "top"): 1})
    assert back_up == ["right imports top (1)"]
    assert figure.count('class="arrow up"') == 1 and figure.count('class="arrow"') == 1
    assert "beside left" in figure
