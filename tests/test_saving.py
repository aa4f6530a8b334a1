"""Files that another process writes from copies: the same bytes, and the same words when they can't be written."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsclip.files import sha256
from dsclip.saving import Background, Problem, WriteNow
from dsclip.saving.commit import commit
from dsclip.saving.copied import HostCopies, tagged
from dsclip.saving.files import SAFETENSORS
from dsclip.saving.hashed_file import HashedFile
from dsclip.saving.shared_memory import Mapped, SharedMemory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def background():
    started = Background(1 << 12, CPU)  # less than what is saved: the memory has to grow
    yield started
    started.close()


class Hidden:
    """Holds a tensor where no walk through containers finds it."""

    def __init__(self):
        self.tensor = torch.arange(7.0)


def content() -> dict:
    """All that a state may be: views of one storage, parameters, empty and whole tensors, shared objects."""
    torch.manual_seed(0)
    whole, name = torch.randn(1000, 10), "".join(["a", "b"])
    shared, noted = [whole[3:5], {"again": whole.T}], torch.ones(2)
    noted.ds_id = name
    return {
        "module": {"weight": torch.nn.Parameter(torch.randn(3, 4), requires_grad=False), "none": torch.empty(0)},
        "views": (whole[2:4], whole[:, 1], whole), "shared": [shared, shared], "of another": torch.randn(4).bfloat16(),
        "scalars": [torch.tensor(3), torch.tensor(1.5, requires_grad=True)], name: torch.Size([2, 3]), "same": [name, name],
        "hidden": Hidden(), "large": torch.randint(0, 255, (1 << 20,), dtype=torch.uint8), 3: None, "empty": {}, "noted": noted,
    }  # fmt: skip


def give(files, folder: Path) -> None:
    folder.mkdir()
    files.torch(content(), folder / "state.pt")
    tensors = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor(True),
        "c": torch.ones(3).bfloat16(),
        "e": torch.empty(0),
    }
    files.tensors(tensors, folder / "average.safetensors", {"shapes": "{}"})
    files.text("naïve\n", folder / "layout.json")


def test_what_the_process_writes_is_byte_for_byte_what_is_written_at_once(background, tmp_path):
    now = WriteNow()
    give(now, tmp_path / "now")
    for launch in ("first", "with the same memory"):
        files = background.files()
        give(files, tmp_path / launch)
        background.write(files)
        found = background.written(wait=True)
        assert found.problem is None and found.seconds > 0
        expected = {Path(path).name: entry for path, entry in now.written().entries.items()}
        assert {Path(path).name: entry for path, entry in found.entries.items()} == expected and len(expected) == 3
        for path, entry in found.entries.items():
            assert Path(path).read_bytes() == (tmp_path / "now" / Path(path).name).read_bytes(), path
            assert entry == {"bytes": Path(path).stat().st_size, "sha256": sha256(Path(path))}
    torch.save(content(), tmp_path / "torch.pt")
    theirs, ours = (torch.load(p, weights_only=False) for p in (tmp_path / "torch.pt", tmp_path / "first" / "state.pt"))
    assert torch.equal(theirs["views"][1], ours["views"][1]) and torch.equal(
        theirs["hidden"].tensor, ours["hidden"].tensor
    )


def test_an_answer_that_comes_with_others_is_seen_by_who_doesnt_wait(background, tmp_path):
    for name in ("a", "b"):
        background.remove([str(tmp_path / "nothing")])
        files = background.files()
        files.text(name, tmp_path / name)
        background.write(files)
        time.sleep(0.2)
        end = time.monotonic() + 60
        while background.written(wait=False) is None:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_what_changes_after_the_copy_is_not_written(background, tmp_path):
    weight, files = torch.zeros(1 << 20), background.files()
    files.torch({"weight": weight}, tmp_path / "state.pt")
    weight.fill_(1)
    background.write(files)
    weight.fill_(2)
    assert background.written(wait=True).problem is None
    assert torch.load(tmp_path / "state.pt")["weight"].abs().max() == 0


def test_a_full_disk_is_told_in_the_same_words(background, small_disk):
    now, files = WriteNow(), background.files()
    now.torch(torch.zeros(1 << 20), small_disk / "state.pt")
    files.torch(torch.zeros(1 << 20), small_disk / "state.pt")
    background.write(files)
    told = Problem(f"{small_disk / 'state.pt'} could not be written (No space left on device)", True)
    assert now.written().problem == background.written(wait=True).problem == told
    (small_disk / "state.pt").unlink()
    now, files = WriteNow(), background.files()
    now.tensors({"a": torch.zeros(1 << 20)}, small_disk / "a.safetensors")
    files.tensors({"a": torch.zeros(1 << 20)}, small_disk / "a.safetensors")
    background.write(files)
    assert now.written().problem == background.written(wait=True).problem
    assert now.written().problem.no_room


def test_a_folder_that_is_gone_is_told_in_the_same_words(background, tmp_path):
    now, files = WriteNow(), background.files()
    for taker in (now, files):
        taker.text("", tmp_path / "gone" / "layout.json")
        taker.text("", tmp_path / "layout.json")  # nothing more is written after the first problem
    background.write(files)
    told = Problem(f"{tmp_path / 'gone' / 'layout.json'} could not be written (No such file or directory)")
    assert now.written().problem == background.written(wait=True).problem == told
    assert not (tmp_path / "layout.json").exists()


def test_tensors_are_read_by_the_library_as_it_would_have_written_them(tmp_path):
    torch.manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, number), dtype=torch.int64).to(dtype)
        for number, dtype in enumerate(SAFETENSORS)
    } | {"number": torch.tensor(3.5), "turned": torch.randn(4, 5).T}
    now = WriteNow()
    now.tensors(tensors, tmp_path / "ours.safetensors", {"shapes": "{}", "naïve": "ü"})
    assert now.written().problem is None
    save_file(
        {name: x.contiguous() for name, x in tensors.items()},
        tmp_path / "theirs.safetensors",
        {"shapes": "{}", "naïve": "ü"},
    )
    ours, theirs = (safe_open(tmp_path / name, "pt") for name in ("ours.safetensors", "theirs.safetensors"))
    assert ours.metadata() == theirs.metadata() and set(ours.keys()) == set(theirs.keys()) == set(tensors)
    for name, x in tensors.items():
        assert torch.equal(ours.get_tensor(name), x) and ours.get_tensor(name).dtype == x.dtype, name


def commit_of(folder: Path, final: Path, old: list[Path] = ()) -> dict:
    return {"folder": str(folder), "final": str(final), "manifest": "m.json", "content": {"step": 3}, "written": {}, "old": [*map(str, old)]}  # fmt: skip


def test_the_process_makes_a_checkpoint_of_a_folder_and_puts_old_ones_aside(background, tmp_path):
    for name in ("new.tmp", "new", "older"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / "file").write_text(name)
    background.commit(commit_of(tmp_path / "new.tmp", tmp_path / "new", [tmp_path / "older"]))
    made = background.committed(wait=True)
    assert made.problem is None and made.seconds > 0
    assert made.aside == [str(tmp_path / "new.old.tmp"), str(tmp_path / "older.removed.tmp")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "new.old.tmp", "older.removed.tmp"]
    said = json.loads((tmp_path / "new" / "m.json").read_text())
    entry = {"bytes": 7, "sha256": sha256(tmp_path / "new" / "part" / "file")}
    assert said == {"step": 3, "files": {"part/file": entry}} and entry["sha256"] == sha256(b"new.tmp")


@pytest.mark.parametrize("where", ["at once", "by the process"])
def test_a_commit_that_fails_says_why_and_leaves_what_was_there(where, background, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "older").mkdir()
    order = commit_of(tmp_path / "gone", tmp_path / "new", [tmp_path / "older"])
    if where == "at once":
        made = commit(order)
    else:
        background.commit(order)
        made = background.committed(wait=True)
    told = Problem(f"{tmp_path / 'gone' / 'm.json.tmp'} could not be written (No such file or directory)")
    assert made.problem == told and made.aside == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "older"]


def test_no_crc_is_computed_for_what_has_a_sha256_and_others_get_theirs(tmp_path):
    now = WriteNow()
    now.torch(torch.arange(1000.0), tmp_path / "ours.pt")
    torch.save(torch.arange(1000.0), tmp_path / "theirs.pt")
    assert now.written().problem is None and torch.equal(torch.load(tmp_path / "ours.pt"), torch.arange(1000.0))
    assert zipfile.ZipFile(tmp_path / "theirs.pt").testzip() is None
    with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
        zipfile.ZipFile(tmp_path / "ours.pt").read("archive/data/0")


def test_a_copy_goes_past_the_cache_and_is_the_same(tmp_path):
    memory = SharedMemory(1 << 20)
    place, storage = memory.take((1 << 18) + 7)
    numbers = torch.empty(0, dtype=torch.uint8).set_(storage)
    numbers.random_(0, 256)
    files = [HashedFile(tmp_path / name) for name in ("pages", "begins within a page", "memory within a page")]
    for file, before, skipped in zip(files, (4096, 5, 0), (0, 0, 1), strict=True):
        file.write(bytes(before))
        file.write(numbers[skipped:].numpy().data)
        file.write(b"end")
        entry, expected = file.finish(), bytes(before) + numbers[skipped:].numpy().tobytes() + b"end"
        file.close()
        path = tmp_path / ("pages", "begins within a page", "memory within a page")[files.index(file)]
        assert path.read_bytes() == expected and entry == {"bytes": len(expected), "sha256": sha256(expected)}
    can = hasattr(os, "O_DIRECT") and place % 4096 == 0
    assert [file.direct_bytes for file in files] == [1 << 18 if can else 0, 0, 0]


def test_signals_that_stop_a_job_leave_it_writing_and_the_end_of_its_rank_ends_it(tmp_path):
    code = f"""
import os, signal, time, torch
from pathlib import Path
from dsclip.saving import Background
background = Background(1 << 20, torch.device("cpu"))
pid = background._process.pid
files = background.files()
files.text("x", Path({str(tmp_path)!r}) / "one")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    os.kill(pid, number)
background.write(files)
print(pid, background.written(wait=True).problem, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pid, problem = done.stdout.split()
    assert problem == "None", done.stderr
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_copies_are_as_many_storages_with_the_same_views():
    memory = SharedMemory(1 << 20)
    whole = torch.arange(100.0)
    state = {"a": whole[10:20], "b": [whole.view(10, 10).T, whole], "c": whole.clone()}
    copies = HostCopies(memory, None)
    found = copies.of(state)
    assert len(copies.places) == 2 and torch.equal(found["b"][0], state["b"][0])
    assert found["b"][0].stride() == (1, 10) and found["a"].storage_offset() == 10
    seen = Mapped(memory.handle).at(copies.places[found["a"].untyped_storage()._cdata], whole.nbytes)
    assert torch.equal(torch.empty(0).set_(seen), whole)
    found["b"][1][0] = 7
    assert found["b"][0][0, 0] == 7 and torch.empty(0).set_(seen)[0] == 7 and whole[0] == 0


def test_a_copy_says_where_the_numbers_were(tmp_path):
    x = torch.arange(3.0)
    with tagged({x.untyped_storage()._cdata: "cuda:1"}):
        torch.save([x, torch.ones(2)], tmp_path / "x.pt")
    torch.save([x, torch.ones(2)], tmp_path / "plain.pt")
    assert b"cuda:1" in (tmp_path / "x.pt").read_bytes() and b"cuda" not in (tmp_path / "plain.pt").read_bytes()
    assert torch.equal(torch.load(tmp_path / "x.pt", map_location="cpu")[0], x)


def test_a_process_that_died_is_noticed_and_replaced_and_at_its_end_has_removed_folders(background, tmp_path):
    process, files = background._process, background.files()
    os.kill(process.pid, signal.SIGSTOP)
    files.text("x", tmp_path / "one")
    background.write(files)
    assert background.written(wait=False) is None
    process.kill()
    problem = background.written(wait=True).problem
    assert problem == Problem(f"the process that writes it ({process.pid}) was killed by SIGKILL")
    files = background.files()
    files.text("x", tmp_path / "two")
    background.write(files)
    assert background.written(wait=True).problem is None and (tmp_path / "two").read_text() == "x"
    (tmp_path / "old" / "deepspeed").mkdir(parents=True)
    background.remove([str(tmp_path / "old")])
    background.close()
    assert not (tmp_path / "old").exists()


def test_the_end_gives_the_memory_back_also_where_the_run_goes_on():
    started = Background(1 << 20, CPU)
    handle = started._memory.handle
    inode = os.fstat(handle).st_ino
    started.close()
    started.close()
    held = [
        os.stat(f"/proc/self/fd/{fd}").st_ino
        for fd in os.listdir("/proc/self/fd")
        if Path(f"/proc/self/fd/{fd}").exists()
    ]
    assert inode not in held and "dsclip-checkpoint" not in Path("/proc/self/maps").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_is_pinned_until_it_is_closed_and_can_be_pinned_again():
    for _ in range(3):  # the next one may lie at the same addresses
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            memory = SharedMemory(1 << 24, pinned=True)
        _, storage = memory.take(1 << 10)
        host = torch.empty(0, dtype=torch.uint8).set_(storage)
        assert host.is_pinned()
        host.copy_(torch.full((1 << 10,), 7, dtype=torch.uint8, device="cuda"), non_blocking=True)
        memory.close()
        assert bool((host == 7).all()) and not host.is_pinned()
        del host, storage, memory
