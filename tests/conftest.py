"""Shared by all tests: one thread, one copy of the demo data set for the whole run, whoever asks first, and a disk that is soon full."""

import fcntl
import os
import subprocess

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session", autouse=True)
def demo_cache(tmp_path_factory):
    """A cache of its own, so that tests neither need nor touch the user's."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose base is a folder in that of the whole run
        folder = tmp_path_factory.getbasetemp().parent / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["DSCLIP_CACHE"] = str(folder)
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    return folder


@pytest.fixture(scope="session")
def demo(demo_cache):
    """The embedded data set's folder."""
    from dsclip.datasets.demo import demo_folder

    with (demo_cache / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return demo_folder()


@pytest.fixture(scope="session")
def tokenizer(demo):
    """The embedded data set's."""
    from dsclip.data import load_tokenizer

    return load_tokenizer("demo")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("a small file system can't be mounted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)
