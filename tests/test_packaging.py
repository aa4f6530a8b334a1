"""A built wheel holds what dsclip looks up by name: recipes, model presets' code, and the DeepSpeed JSONs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_an_installed_wheel_finds_its_recipes_and_deepspeed_configurations(tmp_path):
    pytest.importorskip("setuptools")
    source, wheels, unpacked = tmp_path / "source", tmp_path / "wheels", tmp_path / "unpacked"
    for folder in ("dsclip", "ds_configs"):  # a copy, since a build leaves folders behind
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", ".", "-w", str(wheels)]
    subprocess.run(command, cwd=source, check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        wheel.extractall(unpacked)
    expected = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "dsclip").rglob("*") if p.suffix in (".py", ".yaml", ".csv")
    }
    assert names == expected | {f"dsclip/ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json")}
    code = (
        "from dsclip.config import load_ds_config, load_recipe\n"
        "config = load_ds_config('zero3_persist_bf16', load_recipe('photos'), 2)\n"
        "print(config['zero_optimization']['stage3_param_persistence_threshold'], __import__('dsclip').__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1000000000000", str(unpacked / "dsclip" / "__init__.py")]
