"""tools/index_shards.py, tools/check_data.py and tools/bench_data.py, run as users run them."""

import hashlib
import json
import re

from PIL import Image

from dsclip.bench.data_cli import plan_at_scale
from dsclip.config.schema import DataSection
from dsclip.data import ShardWriter, build_loader, load_tokenizer, read_manifest
from dsclip.data.shards.index_file import from_bytes
from dsclip.data.sources.storage import LOCAL
from dsclip.datasets.check import check_data
from dsclip.distributed import Collectives
from dsclip.train.counters import Counters
from tests.programs import run_program
from tests.shard_files import jpeg, sample, write_set, write_tar


def run(*arguments):
    done = run_program(*arguments)
    return done.returncode, done.stdout + done.stderr


def result(output: str) -> dict:
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def test_indexing_gives_what_writing_gave(tmp_path):
    with ShardWriter(tmp_path, 6, classes=["a", "b"]) as writer:
        for i in range(15):
            writer.write(f"{i:04d}", sample(i, captions=1 + i % 3))
    written = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for name in written:
        if not name.endswith(".tar"):
            (tmp_path / name).unlink()
    code, output = run("tools/index_shards.py", tmp_path, "--json")
    assert code == 0 and result(output)["samples"] == 15
    again = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert {n: c for n, c in again.items() if n.endswith(".idx")} == {
        n: c for n, c in written.items() if n.endswith(".idx")
    }
    assert read_manifest([f"{tmp_path}/x"])["shards"] == json.loads(written["manifest.json"])["shards"]


def test_shards_are_the_same_bytes_whenever_and_by_whomever_they_are_written(tmp_path):
    with ShardWriter(tmp_path, 2) as writer:
        for i in range(3):
            members = {"txt": f"caption {i}".encode(), "jpg": bytes(range(i, i + 200)), "neg.txt": b"x"}
            writer.write(f"{i:06d}", members)
    # Those that Python's tarfile wrote before webdataset did; a change makes other demo shards, see datasets/demo.py.
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()[:16] for p in tmp_path.iterdir()}
    assert digests == {
        "00000.tar": "98c78ce6a8572a93", "00000.tar.idx": "f6187202fceeea18", "00001.tar": "ce5f6ac55b96ffc4",
        "00001.tar.idx": "953cb6e1af80e2f6", "manifest.json": "f9d42b63fca3ddf9",
    }  # fmt: skip


def test_an_index_takes_eight_bytes_a_sample(tmp_path):
    write_set(tmp_path, 1, 100)
    run("tools/index_shards.py", tmp_path)
    content = (tmp_path / "000.tar.idx").read_bytes()
    assert len(content) == 24 + 8 * 100 and len(from_bytes(content, "x", None)) == 100


def test_indexes_can_lie_elsewhere_and_damage_is_told(tmp_path):
    folder = write_set(tmp_path / "shards", 3, 8)
    with (folder / "001.tar").open("r+b") as stream:
        stream.truncate(5000)
    code, output = run("tools/index_shards.py", folder, tmp_path / "index", "--json")
    assert code == 0 and result(output)["problems"] == {"damaged shard": 1}
    assert not list(folder.glob("*.idx")) and len(list((tmp_path / "index").glob("*.idx"))) == 3
    code, output = run("tools/check_data.py", tmp_path / "index", "--json")
    assert code == 0 and result(output)["usable"] == result(output)["samples"] < 24


def test_check_data_counts_by_reason_and_fails_for_ci(tmp_path):
    members = {f"{i:03d}": sample(i) for i in range(40)}
    members |= {
        "100": {"jpg": b"x", "txt": b"a"},
        "101": {"jpg": jpeg(1)},
        "102": sample(5),
        "103": {"jpg": jpeg(9, 64), "txt": b"one two"},
    }
    write_tar(tmp_path / "a.tar", members)
    sheet = tmp_path / "sheet.png"
    code, output = run("tools/check_data.py", tmp_path / "a.tar", "--json", "--sheet", sheet)
    found = result(output)
    assert code == 1 and found["bad"] == {"undecodable image": 1, "no caption": 1} and not found["ok"]
    assert found["duplicate_images"] == found["duplicate_captions"] == 1
    assert found["widths"]["p50"] == 32 and found["widths"]["p100"] == 64 and found["caption_words"]["p0"] == 2
    assert Image.open(sheet).size == (8 * 168, 4 * (160 + 36 + 8))
    code, output = run("tools/check_data.py", tmp_path / "a.tar", "--max-bad", "0.1")
    assert code == 0 and "within the allowed 10.00%" in output
    assert run("tools/check_data.py", tmp_path / "none")[0] == 2


def test_check_data_accepts_and_refuses_what_training_does(tmp_path, demo):
    """Stray bytes in a JPEG, a sample over the limit, and missing group keys, against a loader with the same settings."""
    stray = jpeg(1)[:-2] + b"\x12\x34\x56" * 5 + jpeg(1)[-2:]
    members = {f"{i:03d}": sample(i) | {"json": json.dumps({"caption": "a", "place": i}).encode()} for i in range(8)}
    members |= {"100": {"jpg": stray, "json": members["001"]["json"]}, "101": members["002"] | {"png": bytes(9000)}}
    members |= {"102": {"jpg": jpeg(1), "json": b'{"caption": "no place"}'}}
    write_tar(tmp_path / "a.tar", members)
    data = DataSection(
        train_shards=str(tmp_path), workers=0, max_bad_fraction=1.0, max_sample_bytes=8000, group_key="place"
    )
    report = check_data(str(tmp_path), LOCAL, data=data, image_size=16)
    loader = build_loader(data, tokenizer=load_tokenizer("demo"), image_size=16, context_length=16, global_batch_size=9, seed=0)  # fmt: skip
    batch = next(iter(loader))
    assert report.usable == 9 and report.bad == batch.report.bad == {"sample too large": 1, "no group key": 1}
    assert report.slow_decoded == batch.report.slow_decoded == 1
    counters = Counters(Collectives(0, 1), None, None)
    counters.add(batch.report, skipped=False)
    counters.gather(None)
    assert (
        counters.total["slow_decoded"] == 1
        and Counters(Collectives(0, 1), counters.total, None).total["slow_decoded"] == 1
    )


def test_check_data_finds_shards_that_are_not_those_of_the_manifest(tmp_path):
    write_set(tmp_path, 2, 8)
    run("tools/index_shards.py", tmp_path)
    content = bytearray((tmp_path / "001.tar").read_bytes())
    content[700] ^= 1
    (tmp_path / "001.tar").write_bytes(content)
    code, output = run("tools/check_data.py", tmp_path, "--json")
    assert code == 1 and result(output)["bad"]["content is not the manifest's"] == 1
    assert list(result(output)["worst_shards"]) == [f"{tmp_path.name}/001.tar"]


def test_a_damaged_shard_is_named_and_never_within_what_is_allowed(tmp_path):
    write_set(tmp_path, 2, 8)
    content = (tmp_path / "001.tar").read_bytes()
    (tmp_path / "001.tar").write_bytes(content[: len(content) // 2])
    code, output = run("tools/check_data.py", tmp_path, "--max-bad", "0.5")
    assert code == 1
    assert re.search(
        rf"{tmp_path.name}/001.tar: only its first \d samples are used: it can't be read beyond byte", output
    )


def test_indexing_files_that_are_no_tar_is_an_error(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "b.tar").write_bytes(b"")
    code, output = run("tools/index_shards.py", tmp_path)
    assert (
        code == 2 and "a.tar is no tar" in output and not list(tmp_path.glob("*.idx")) + list(tmp_path.glob("*.json"))
    )


def test_bench_data_measures_all_pipelines(demo):
    code, output = run("tools/bench_data.py", "--image-size", "32", "--samples", "64", "--repeats", "1", "--json")
    assert code == 0, output
    found = result(output)
    for name in ("dsclip", "plain", "dsclip_2_workers"):
        assert found[name]["samples_per_second_per_core"] > 0


def test_the_scale_of_laion_fits():
    found, _ = plan_at_scale()
    assert found["samples"] == 2 * 10**9 and found["different_places"] > 2000
    assert 0 < found["extra_peak_mb"] < 500


def test_a_shard_that_the_manifest_lists_and_nobody_has_is_missed(tmp_path):
    write_set(tmp_path, 3, 8)
    run("tools/index_shards.py", tmp_path)
    (tmp_path / "001.tar").unlink()
    code, output = run("tools/check_data.py", tmp_path)
    assert code == 2 and "001.tar" in output and "not there" in output and "Traceback" not in output
    assert run("tools/index_shards.py", tmp_path)[0] == 0 and run("tools/check_data.py", tmp_path)[0] == 0


def test_hashes_are_those_of_each_shards_own_manifest(tmp_path):
    for name, captions in (("a", 1), ("b", 3)):
        write_set(tmp_path / name, 1, 8, captions=captions)
        run("tools/index_shards.py", tmp_path / name)
    assert run("tools/check_data.py", f"{tmp_path}/a::{tmp_path}/b/")[0] == 0
    run("tools/index_shards.py", tmp_path / "a", tmp_path / "index")
    path = tmp_path / "a" / "000.tar"
    content = bytearray(path.read_bytes())
    content[content.index(b"a red circle")] = ord("A")
    path.write_bytes(content)
    code, output = run("tools/check_data.py", tmp_path / "index", "--json")
    assert code == 1 and result(output)["bad"] == {"content is not the manifest's": 1}
