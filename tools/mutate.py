"""Mutation check: breaks a module's lines one at a time and sees whether the tests that belong to it fail.

One module:          python tools/mutate.py dsclip/losses/masks.py
The whole check:     nice python tools/mutate.py dsclip/losses dsclip/engine dsclip/data/order dsclip/checkpoint --json > found.json

Ten lines a module, chosen by a fixed seed, are changed in a copy of the checkout: a comparison, an arithmetic sign, a
constant by one, a statement dropped, two arguments exchanged, a condition negated. The tests run in a process forked
after the slow imports and stop at the first failure. A break that no test notices is a survivor: a gap, or a change that
makes no difference. docs/tests.md has the last table.
"""

import argparse
import ast
import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dsclip.command_line import parser, run_tool, say
from dsclip.errors import RunFailed, UserError

ROOT = Path(__file__).parent.parent
# The test files of a module, those of the longest fitting prefix, the quick ones first.
TESTS = {
    "dsclip/losses": ["test_losses", "test_losses_info_nce", "test_losses_dense", "test_losses_registry", "test_losses_tile_size", "test_losses_fused"],
    "dsclip/losses/blocks": ["test_losses_ring"],
    "dsclip/losses/debiased": ["test_losses_debiased", "test_losses"],
    "dsclip/losses/gathering": ["test_losses_ring", "test_losses", "test_losses_info_nce"],
    "dsclip/losses/products": ["test_losses_products"],
    "dsclip/losses/feature_statistics": ["test_losses_feature_statistics"],
    "dsclip/losses/matryoshka": ["test_losses_matryoshka"],
    "dsclip/data/order": ["test_data_order", "test_data_order_resampled", "test_data_order_elastic", "test_data_shards_identity"],
    "dsclip/data/order/shards": ["test_data_stream", "distributed/test_stream"],
    "dsclip/checkpoint": ["test_checkpoint_lineage", "test_checkpoint_manifest", "test_checkpoint_store", "test_train_run_folder", "distributed/test_checkpoint", "distributed/test_runs"],
    "dsclip/engine": ["test_engine_negatives", "test_engine_reads", "distributed/test_negatives", "distributed/test_exactness"],
    "dsclip/engine/build": ["distributed/test_exactness", "distributed/test_gathers", "distributed/test_init"],
    "dsclip/engine/contrastive": ["test_engine_negatives", "distributed/test_negatives", "distributed/test_exactness",
                                  "distributed/test_checkpoint", "distributed/test_nonfinite"],
    "dsclip/engine/consolidate": ["distributed/test_checkpoint"],
    "dsclip/engine/cpu_bf16": ["test_engine_cpu_bf16"],
    "dsclip/engine/finite": ["distributed/test_nonfinite"],
    "dsclip/engine/flat_gather": ["distributed/test_gathers", "distributed/test_exactness"],
    "dsclip/engine/host_copy": ["test_engine_reads"],
    "dsclip/engine/loss_scalars": ["test_engine_negatives", "distributed/test_exactness", "distributed/test_checkpoint"],
    "dsclip/engine/momentum": ["test_engine_negatives", "distributed/test_checkpoint"],
    "dsclip/engine/quiet_deepspeed": ["distributed/test_gathers", "distributed/test_training"],
    "dsclip/engine/replicas": ["test_engine_replicas"],
    "dsclip/engine/state": ["test_checkpoint_store"],
    "dsclip/engine/step_metrics": ["test_engine_reads", "test_engine_negatives", "test_train_watching", "distributed/test_nonfinite"],
    "dsclip/engine/whole_tensors": ["distributed/test_init", "distributed/test_exactness"],
    "dsclip/train/guard": ["test_train_guard", "distributed/test_rollback"],
    "dsclip/train/spike_rule": ["test_train_spike_rule"],
}  # fmt: skip
# In quick looks these run with the single rank that needs no launch.
SINGLE = ("tests/distributed/test_exactness.py", "tests/distributed/test_negatives.py")
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
# Exchanging their arguments changes nothing.
SYMMETRIC = "max min maximum minimum logaddexp promote_types equal allclose isclose samefile".split()
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


@dataclass(frozen=True)
class Mutation:
    """One broken line. outcome: `caught`, `hung` (caught by the clock) or `survived`."""

    module: str
    line: int
    kind: str
    before: str
    after: str
    outcome: str = ""
    seconds: float = 0.0


def changes(node: ast.AST) -> Iterator[tuple[str, Callable[[ast.AST], None]]]:
    """(kind, what breaks a copy of the node in place) for every way to break this node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        yield "comparison", lambda n: n.ops.__setitem__(0, COMPARISONS[type(n.ops[0])]())
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield "arithmetic", lambda n: setattr(n, "op", ARITHMETIC[type(n.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "arithmetic", lambda n: setattr(n, "op", ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "constant", lambda n: setattr(n, "value", n.value + 1)
    if isinstance(node, ast.Call) and len(node.args) > 1 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        called = ast.unparse(node.func).split(".")[-1]
        if called not in SYMMETRIC and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
            yield "swapped", lambda n: n.args.__setitem__(slice(0, 2), n.args[1::-1])
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield "negated", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.BoolOp):
        yield "negated", lambda n: setattr(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())


def droppable(node: ast.AST) -> bool:
    """Whether the statement can go without leaving a name undefined."""
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(
        node, ast.AugAssign | ast.Raise
    )


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, index) of every node that may be broken: not annotations, nor the text of errors."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list") or (isinstance(tree, ast.Raise) and field == "exc"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield tree, field, index
                yield from places(child)


def child_of(parent: ast.AST, field: str, index: int | None) -> ast.AST:
    """The node at a place."""
    value = getattr(parent, field)
    return value if index is None else value[index]


def excerpts(before: str, after: str) -> tuple[str, str]:
    """Both lines around the first place where they differ."""
    start = max(0, len(os.path.commonprefix([before, after])) - 50)
    return before[start : start + 110], after[start : start + 110]


def mutants(module: str, count: int, seed: int) -> list[tuple[Mutation, str]]:
    """(mutation, the module's broken source) for `count` lines of the module, the same ones for a seed."""
    source = (ROOT / module).read_text(encoding="utf-8")
    tree, by_line = ast.parse(source), {}
    whole = ast.unparse(tree).splitlines()
    for number, (parent, field, index) in enumerate(places(tree)):
        node = child_of(parent, field, index)
        for variant, (kind, _) in enumerate(changes(node)):
            by_line.setdefault(node.lineno, []).append((number, variant, kind))
        if droppable(node):
            by_line.setdefault(node.lineno, []).append((number, None, "dropped"))
    rng = random.Random(f"{seed} {module}")
    lines = rng.sample(sorted(by_line), min(count, len(by_line)))
    found = []
    for line in sorted(lines):
        number, variant, kind = rng.choice(by_line[line])
        broken = copy.deepcopy(tree)
        parent, field, index = list(places(broken))[number]
        if variant is None:
            getattr(parent, field)[index] = ast.Pass()
        else:
            list(changes(child_of(parent, field, index)))[variant][1](child_of(parent, field, index))
        text = ast.unparse(ast.fix_missing_locations(broken)) + "\n"
        before, after = next(pair for pair in zip(whole, text.splitlines(), strict=False) if pair[0] != pair[1])
        found.append((Mutation(module, line, kind, *excerpts(before.strip(), after.strip())), text))
    return found


def tests_of(module: str) -> list[str]:
    """The test files that belong to a module."""
    fitting = [prefix for prefix in TESTS if module.startswith(prefix)]
    if not fitting:
        raise UserError(f"{module}: the mapping TESTS in tools/mutate.py names no test for it; add its test files")
    return [f"tests/{name}.py" for name in TESTS[max(fitting, key=len)]]


def run_tests(checkout: Path, tests: list[str], timeout_s: float) -> str:
    """Runs the tests of a checkout in a forked process; `caught`, `hung` or `survived`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        with open(checkout / "log.txt", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        os.chdir(checkout)
        os.environ |= {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.path.insert(0, str(checkout))
        for name in [m for m in sys.modules if m.split(".")[0] in ("dsclip", "tests")]:
            del sys.modules[name]
        import pytest

        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", *tests])))
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "caught"
        time.sleep(0.1)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def checkout_copy(folder: Path) -> Path:
    """The tracked files, changes included, in a folder of their own: the checkout itself is never broken."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def check_module(
    module: str, checkout: Path, arguments: argparse.Namespace, unbroken: dict[str, float]
) -> list[Mutation]:
    """Every mutation of a module with its outcome; raises RunFailed when its tests fail unbroken.

    unbroken: how many seconds tests took that passed before anything was broken; those are not run again.
    """
    tests = tests_of(module)
    if arguments.quick:
        tests = ["-k", "not ranks", *(t for t in tests if "distributed" not in t or t in SINGLE)]
    named, started = " ".join(tests), time.monotonic()
    if named not in unbroken:
        if run_tests(checkout, tests, arguments.timeout) != "survived":
            raise RunFailed(f"{named} fail before anything is broken:\n{(checkout / 'log.txt').read_text()[-2000:]}")
        unbroken[named] = time.monotonic() - started
    timeout_s = 60 + 5 * unbroken[named]
    results = []
    for mutation, broken in mutants(module, arguments.lines, arguments.seed):
        (checkout / module).write_text(broken, encoding="utf-8")
        started = time.monotonic()
        outcome = run_tests(checkout, tests, min(timeout_s, arguments.timeout))
        results.append(
            Mutation(**asdict(mutation) | {"outcome": outcome, "seconds": round(time.monotonic() - started, 1)})
        )
        say(f"{outcome:9}{module}:{mutation.line} {mutation.kind}: {mutation.before}  ->  {mutation.after}")
    shutil.copy2(ROOT / module, checkout / module)
    return results


def modules_below(paths: list[str]) -> list[str]:
    """The modules at or below the given paths, without those that hold nothing to break."""
    found = []
    for path in paths:
        top = (ROOT / path).resolve()
        if not top.exists():
            raise UserError(f"{path} is no module or folder of this checkout")
        files = [top] if top.is_file() else sorted(top.rglob("*.py"))
        found += [f.relative_to(ROOT).as_posix() for f in files]
    return [module for module in found if mutants(module, 1, 0)]


def tool(arguments: argparse.Namespace) -> tuple[dict, str]:
    """Breaks and tests every module asked for."""
    sys.dont_write_bytecode = True  # a broken file as old and long as the whole one must not meet its bytecode
    modules = modules_below(arguments.modules)
    for slow in ("torch", "deepspeed", "transformers", "pytest", "hypothesis"):
        __import__(slow)
    everything, unbroken = [], {}
    with tempfile.TemporaryDirectory() as folder:
        checkout = checkout_copy(Path(folder))
        for module in modules:
            everything += check_module(module, checkout, arguments, unbroken)
    table = [f"| {'module':40} | broken | caught |", "|---|---|---|"]
    for module in modules:
        of_module = [m for m in everything if m.module == module]
        table.append(f"| {module:40} | {len(of_module)} | {sum(m.outcome != 'survived' for m in of_module)} |")
    survivors = [m for m in everything if m.outcome == "survived"]
    share = 1 - len(survivors) / max(1, len(everything))
    text = "\n".join([
        *table, f"\n{share:.1%} of {len(everything)} caught",
        *(f"survived: {m.module}:{m.line} {m.kind}: {m.before}  ->  {m.after}" for m in survivors),
    ])  # fmt: skip
    return {"share_caught": share, "mutations": [asdict(m) for m in everything]}, text


def main(argv: list[str] | None = None) -> int:
    """Command-line entry."""
    made = parser(
        "Breaks a module's lines one at a time and runs its tests.", "python tools/mutate.py dsclip/losses/masks.py"
    )
    made.add_argument("modules", nargs="+", metavar="MODULE", help="a module or a folder of modules below dsclip/")
    made.add_argument("--lines", type=int, default=10, help="how many lines of each are broken (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help="without the tests that start ranks: a first look")
    made.add_argument("--seed", type=int, default=0, help="another seed breaks other lines (default: %(default)s)")
    made.add_argument("--timeout", type=float, default=1800, help="seconds for one run of the tests at most")
    return run_tool(tool, made.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
