"""The code base keeps its own rules: layout, imports, sizes."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

from dsclip.config import load_recipe
from dsclip.config.deepspeed import packaged_ds_configs
from dsclip.config.reference import reference
from tests.programs import run_program

ROOT = Path(__file__).parent.parent
SOURCES = sorted(p for folder in ("dsclip", "launchers", "tools", "tests") for p in (ROOT / folder).rglob("*.py"))
TEXT = {".py", ".md", ".sh", ".yaml", ".yml", ".json", ".toml", ".cfg", ".txt", ".in"}
PACKAGE = [p for p in SOURCES if p.is_relative_to(ROOT / "dsclip")]


def run(*arguments: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=env)


def test_importing_every_module_does_nothing_visible():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in PACKAGE]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_are_small_and_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 330
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "says nothing about what it is for"


def test_every_launcher_and_tool_says_how_to_run_it():
    for path in [*(ROOT / "launchers").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        assert f"{path.parent.name}/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))
        done = run_program(path.relative_to(ROOT).as_posix(), "--help")
        assert done.returncode == 0 and "example" in done.stdout, done.stderr


def test_the_public_names_are_where_the_documentation_says():
    import dsclip

    assert dsclip.create_model("demo").config.image_size == 64
    assert dsclip.losses.softmax and dsclip.data.build_loader
    assert dsclip.ContrastiveEngine.train_step
    with pytest.raises(AttributeError):
        _ = dsclip.no_such_name


def test_tracked_files_refer_only_to_what_is_in_this_repository():
    kept_out = re.compile("|".join(["DESIGN" + r"\.md", "STYLE" + r"\.md", r"(?<![\w.])/(work|root|home)/\w"]))
    folders = ("dsclip", "launchers", "tools", "tests", "docs", "ds_configs")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in TEXT]
    for path in [*paths, *(p for p in ROOT.iterdir() if p.suffix in TEXT or p.name == "Makefile")]:
        found = kept_out.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)} mentions {found[0]}"


def test_the_reference_of_recipe_keys_is_what_its_tool_writes():
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference(), "write it again: python tools/make_reference.py"


def test_links_in_the_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert ":" in target or (path.parent / target).exists(), f"{path.relative_to(ROOT)}: {target}"


def test_every_test_file_is_named_after_what_it_tests():
    rooms = {p.stem for p in (ROOT / "dsclip").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    for path in (ROOT / "tests").glob("test_*.py"):
        name = path.stem.removeprefix("test_")
        whole = name in {*rooms, "packaging", "repository", "tools"}
        assert whole or name.split("_")[0] in rooms, f"{path.name}: name it test_ROOM_MODULE.py after a room of dsclip"


def test_the_layers_page_lists_the_rooms_in_the_order_that_is_checked():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    rooms = [room.strip() for row in contract["layers"] for room in row.split("|")]
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8").split("## Layers")[1]
    cells = re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)
    listed = [room for cell in cells[1:] for room in re.findall(r"`(\w+)`", cell)]
    # Rooms of one layer may change places.
    position = {room.strip(): n for n, row in enumerate(contract["layers"]) for room in row.split("|")}
    assert sorted(listed) == sorted(rooms)
    assert [position[room] for room in listed] == sorted(position.values())
    figure = (ROOT / "docs" / "images" / "layers.svg").read_text(encoding="utf-8")
    assert set(rooms) <= set(re.findall(r">(\w+)</text>", figure)), "draw it again: tools/draw_layers.py"


def test_the_documents_commands_parse():
    from dsclip.train.cli import parse_arguments

    commands = 0
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            if not re.match(r"(    )?(deepspeed|torchrun) .*launchers/train.py", line) or "[" in line or "…" in line:
                continue
            words = shlex.split(line, comments=True)
            arguments = parse_arguments(words[words.index("launchers/train.py") + 1 :])
            load_recipe("demo", [o for o in arguments.overrides if not o.startswith("loss.plugin")])
            known = arguments.ds_config in packaged_ds_configs() or (ROOT / arguments.ds_config).is_file()
            assert known, f"{path.name}: {line}"
            commands += 1
    assert commands >= 8
