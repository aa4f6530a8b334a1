"""Hostile and broken shards, one file each: exactly the good samples come out, nothing runs, memory stays bounded."""

import bz2
import gzip
import io
import itertools
import os
import pickle
import resource
import tarfile
import threading
import zlib
from collections import Counter

import pytest
from PIL import Image

from dsclip.config.load import parse_yaml
from dsclip.config.schema import DataSection
from dsclip.data import build_loader
from dsclip.data.reading.samples import read_shard
from dsclip.data.shards.index_file import to_bytes
from dsclip.data.shards.tar_index import scan_file
from dsclip.data.sources.storage import LOCAL
from dsclip.datasets.check import check_data
from dsclip.errors import UserError
from tests.shard_files import jpeg, sample, write_tar

GOOD = 12


def epoch(folder, tokenizer, good=GOOD, **options):
    """(numbers of the samples of one epoch, counts of bad samples, batches) with batches of one."""
    data = DataSection(train_shards=str(folder), workers=0, max_bad_fraction=1.0, **options)
    loader = build_loader(data, tokenizer=tokenizer, image_size=16, context_length=16, global_batch_size=1, seed=0)
    batches = list(itertools.islice(loader, good))
    bad = Counter()
    for batch in batches:
        bad.update(batch.report.bad)
    return sorted(int(b.report.captions[0].rpartition(" ")[2]) for b in batches), bad, batches


def good_samples(first=0):
    return {f"{i:05d}": sample(i) for i in range(first, first + GOOD)}


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "npy", "jpg.pyd", "ten", "mp", "cbor"])
def test_s1_pickles_never_run(tmp_path, tokenizer, extension):
    target = tmp_path / "executed"
    write_tar(
        tmp_path / "a.tar", {k: m | {extension: pickle.dumps(Payload(target))} for k, m in good_samples().items()}
    )
    numbers, bad, _ = epoch(tmp_path / "a.tar", tokenizer)
    assert numbers == list(range(GOOD)) and not bad and not target.exists()


@pytest.mark.parametrize("place", ["override", "file"])
def test_s2_pipes_never_run(tmp_path, tokenizer, place):
    spec = f"pipe:touch {tmp_path}/X; cat a.tar"
    with pytest.raises(UserError, match="pipes are never opened"):
        epoch(parse_yaml(f"a: '{spec}'", "a recipe")["a"] if place == "file" else spec, tokenizer)
    assert not (tmp_path / "X").exists()


def test_s3_the_environment_rewrites_no_address(tmp_path, tokenizer, monkeypatch):
    write_tar(tmp_path / "a.tar", good_samples())
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {tmp_path}/X; cat {tmp_path}")
    monkeypatch.setenv("WDS_X", "touch")
    assert epoch(tmp_path / "a.tar", tokenizer)[0] == list(range(GOOD))
    with pytest.raises(UserError, match="does not exist"):
        epoch("${X}/a.tar", tokenizer)
    assert not (tmp_path / "X").exists()


def test_s8_keys_are_never_paths(tmp_path, tokenizer):
    names = ["../../etc/x", "/abs/y", "..", "a/../../b", "C:\\w\\z", "nul\x07"]
    members = {name: sample(i) for i, name in enumerate(names)}
    write_tar(tmp_path / "a.tar", members)
    before = sorted(p.name for p in tmp_path.iterdir())
    report = check_data(str(tmp_path / "a.tar"), LOCAL, sheet=tmp_path / "sheet.png")
    numbers, _, _ = epoch(tmp_path / "a.tar", tokenizer, good=report.usable)
    assert report.usable == len(numbers) >= 5
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "sheet.png"])


def test_s8_links_and_devices_are_not_followed(tmp_path, tokenizer):
    (tmp_path / "secret").write_text("do not read")
    path = tmp_path / "a.tar"
    write_tar(path, good_samples())
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"link{ord(kind)}.jpg")
            info.type, info.linkname = kind, str(tmp_path / "secret")
            tar.addfile(info)
    assert epoch(path, tokenizer)[0] == list(range(GOOD))


def png_bomb(side: int) -> bytes:
    """A picture of side × side pixels in a few hundred kilobytes, written without ever holding it."""

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    packer, rows = zlib.compressobj(9), []
    for _ in range(side):
        rows.append(packer.compress(bytes(3 * side + 1)))
    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    data = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("decoder", ["fast", "exact"])
def test_s9_picture_bombs_are_not_decoded(tmp_path, tokenizer, decoder):
    small = jpeg(1)
    wide = bytearray(small)
    at = small.index(b"\xff\xc0")
    wide[at + 5 : at + 9] = (60000).to_bytes(2, "big") * 2  # the header alone claims 3.6 gigapixels
    bombs = {"bomb1": {"png": png_bomb(12000), "txt": b"a"}, "bomb2": {"jpg": bytes(wide), "txt": b"a"}}
    write_tar(tmp_path / "a.tar", good_samples() | bombs)
    before = peak_mb()
    numbers, bad, _ = epoch(tmp_path / "a.tar", tokenizer, good=2 * GOOD, decoder=decoder)
    assert set(numbers) == set(range(GOOD)) and set(bad) == {"too many pixels"} and bad["too many pixels"] >= 2
    assert peak_mb() - before < 200


def test_s9_members_compressed_on_their_own_are_not_unpacked(tmp_path, tokenizer):
    bomb = {"gzbomb": {"jpg": jpeg(1), "txt.gz": gzip.compress(bytes(400_000_000), 1)}}
    write_tar(tmp_path / "a.tar", good_samples() | bomb)
    before = peak_mb()
    numbers, bad, _ = epoch(tmp_path / "a.tar", tokenizer, good=2 * GOOD)
    assert set(numbers) == set(range(GOOD)) and set(bad) == {"no caption"}
    assert peak_mb() - before < 200


@pytest.mark.parametrize("compress", [bz2.compress, gzip.compress])
def test_s9_compressed_archives_are_no_shards(tmp_path, tokenizer, compress):
    write_tar(tmp_path / "a.tar", good_samples())
    (tmp_path / "b.tar").write_bytes(compress(bytes(200_000_000)))
    before = peak_mb()
    numbers, bad, _ = epoch(tmp_path, tokenizer)
    assert numbers == list(range(GOOD)) and bad == {"damaged shard": 1}
    assert peak_mb() - before < 200


def test_s9_large_members_and_captions_are_not_read(tmp_path, tokenizer):
    large = {"big": {"jpg": bytes(3_000_000), "txt": b"a"}, "long": {"jpg": jpeg(1), "txt": b"word " * 400_000}}
    write_tar(tmp_path / "a.tar", good_samples() | large)
    numbers, bad, _ = epoch(tmp_path / "a.tar", tokenizer, good=2 * GOOD, max_sample_bytes=2_500_000)
    assert set(numbers) == set(range(GOOD)) and set(bad) == {"sample too large", "caption too long"}


def test_s10_a_brace_bomb_is_counted_not_expanded(tokenizer):
    for spec in ("x{0..99999999}.tar", "x{0..9999}{0..9999}.tar"):
        with pytest.raises(UserError, match="100,000,000 shards"):
            epoch(spec, tokenizer)


@pytest.mark.parametrize(
    "text", ["a: !!python/object/apply:os.system ['touch X']", "a: 1\na: 2", "a: &x [1]\nb: [*x, *x]"]
)
def test_s14_recipes_hold_data_only(text):
    with pytest.raises(UserError):
        parse_yaml(text, "a recipe")


@pytest.mark.parametrize("cut", [1, 300, 512, 700, 1024, 1100, 2048, 2500, 5000])
@pytest.mark.parametrize("manifest", [False, True])
def test_a_cut_shard_never_pairs_a_picture_with_another_caption(tmp_path, tokenizer, cut, manifest):
    """Keys restart in every shard, so half a sample at the end of one could absorb the next one's caption."""
    for s in range(2):
        members = {f"{i:03d}": sample(i + GOOD * s) for i in range(GOOD)}
        write_tar(tmp_path / f"{s}.tar", members)
    if manifest:
        from dsclip.datasets.index import index_shards

        index_shards(str(tmp_path), None, LOCAL)
    path = tmp_path / "0.tar"
    with path.open("r+b") as stream:
        stream.truncate(scan_file(path).starts[-1] + 512 - 1 + cut if cut < 512 else path.stat().st_size - 10240 - cut)
    numbers, bad, batches = epoch(tmp_path, tokenizer, good=40, on_unreadable="skip")
    pictures = {i: numbers_of_picture(tmp_path / "one", i, tokenizer) for i in set(numbers)}
    assert set(range(GOOD, 2 * GOOD)) <= set(numbers) and len(set(numbers)) < 2 * GOOD
    for batch in batches:
        number = int(batch.report.captions[0].rpartition(" ")[2])
        assert (batch.images[0].float() - pictures[number].float()).abs().mean() < 30
    if manifest:
        assert bad["missing sample"] >= 1
        assert {e["what"] for b in batches for e in b.report.journal} == {"fewer samples than its manifest says"}
    else:
        assert bad["damaged shard"] == 1


def numbers_of_picture(folder, number, tokenizer):
    folder.mkdir(exist_ok=True)
    path = folder / f"{number}.tar"
    if not path.exists():
        write_tar(path, {"0": sample(number)})
    return epoch(path, tokenizer, good=1)[2][0].images[0]


def test_garbage_between_members_loses_what_follows_and_says_so(tmp_path, tokenizer):
    write_tar(tmp_path / "a.tar", good_samples())
    index = scan_file(tmp_path / "a.tar")
    with (tmp_path / "a.tar").open("r+b") as stream:
        stream.seek(int(index.starts[8]))
        stream.write(b"\xde\xad" * 256)
    numbers, bad, _ = epoch(tmp_path / "a.tar", tokenizer, good=7)
    assert numbers == list(range(7)), "the sample before the damage may be half a sample"
    assert bad == {"damaged shard": 1}


def test_flipped_bytes_under_an_index_are_bad_samples_not_others(tmp_path, tokenizer):
    write_tar(tmp_path / "a.tar", good_samples())
    (tmp_path / "a.tar.idx").write_bytes(to_bytes(scan_file(tmp_path / "a.tar")))
    index = scan_file(tmp_path / "a.tar")
    with (tmp_path / "a.tar").open("r+b") as stream:
        stream.seek(int(index.starts[5]) + 3)
        stream.write(b"Z")
    from dsclip.data.shards.manifest import write_manifest

    size = (tmp_path / "a.tar").stat().st_size
    write_manifest(tmp_path, [{"name": "a.tar", "samples": GOOD, "bytes": size, "sha256": ""}])
    numbers, bad, _ = epoch(tmp_path, tokenizer, good=2 * GOOD - 2)
    assert set(numbers) == set(range(GOOD)) - {5} and set(bad) == {"damaged sample"}


@pytest.mark.parametrize("order", ["interleaved", "repeated"])
def test_members_of_one_key_that_lie_apart_make_no_sample(tmp_path, tokenizer, order):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:

        def add(name, content):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for i in range(4):
            for extension, content in sample(i).items():
                add(f"{i}.{extension}", content)
        if order == "interleaved":
            add("a.jpg", jpeg(50)), add("b.jpg", jpeg(51)), add("a.txt", b"a 90"), add("b.txt", b"b 91")
        else:
            for extension, content in sample(77).items():
                add(f"1.{extension}", content)
    bad = {}
    usable = {r.key for r in read_shard(str(path), bad) if {"jpg", "txt"} <= r.members.keys()}
    assert usable == {"0", "1", "2", "3"}
    assert bad == {"repeated key": 2 if order == "interleaved" else 1}
    numbers, _, _ = epoch(path, tokenizer, good=8)
    assert set(numbers) == {0, 1, 2, 3}


def test_empty_bad_and_huge_captions_are_counted(tmp_path, tokenizer):
    odd = {"e": b"", "s": b" \n\t", "u": b"\xff\xfe\xfa", "n": "nul\0 and \u202e turned 99".encode()}
    write_tar(tmp_path / "a.tar", good_samples() | {k: {"jpg": jpeg(1), "txt": v} for k, v in odd.items()})
    report = check_data(str(tmp_path / "a.tar"), LOCAL)
    assert report.bad == {"empty caption": 2, "unreadable caption": 1} and report.usable == GOOD + 1


def test_bad_samples_cost_no_pause(tmp_path, tokenizer):
    """webdataset's warn_and_continue sleeps half a second for each."""
    write_tar(tmp_path / "a.tar", good_samples() | {f"x{i}": {"jpg": b"x", "txt": b"a"} for i in range(100)})
    done = threading.Event()
    watch = threading.Thread(target=lambda: (epoch(tmp_path / "a.tar", tokenizer), done.set()), daemon=True)
    watch.start()
    assert done.wait(20), "100 bad samples took longer than 20 s"


def test_an_image_is_what_pillow_says_it_is(tmp_path, tokenizer):
    """A PNG, a WebP, a grey and a CMYK JPEG and a palette through both decoders."""
    samples = {}
    for i, (mode, format) in enumerate(
        [("RGB", "PNG"), ("RGB", "WEBP"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG")]
    ):
        stream = io.BytesIO()
        Image.open(io.BytesIO(jpeg(i, 40))).convert(mode).save(stream, format)
        samples[f"{i}"] = {format.lower(): stream.getvalue(), "txt": f"a picture {i}".encode()}
    write_tar(tmp_path / "a.tar", samples)
    shown = {}
    for decoder in ("fast", "exact"):
        numbers, bad, batches = epoch(tmp_path / "a.tar", tokenizer, good=5, decoder=decoder)
        assert numbers == list(range(5)) and not bad
        shown[decoder] = {b.report.captions[0]: b.images[0].float() for b in batches}
    for caption, image in shown["exact"].items():
        assert (image - shown["fast"][caption]).abs().mean() < 4, caption
