"""Small real shards for tests, good and broken."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def jpeg(seed: int, size: int = 32, format: str = "JPEG") -> bytes:
    """A small picture that differs for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(stream, format)
    return stream.getvalue()


def sample(index: int, captions: int = 1) -> dict[str, bytes]:
    """The members of one good sample."""
    if captions == 1:
        return {"jpg": jpeg(index), "txt": f"a red circle number {index}".encode()}
    sentences = [f"a {colour} square number {index}" for colour in ("red", "green", "blue")][:captions]
    return {"jpg": jpeg(index), "json": json.dumps({"caption": sentences}).encode()}


def write_tar(path, samples: dict[str, dict[str, bytes]]) -> None:
    """samples: {key: {extension: content}}."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def write_set(folder, shards: int, per_shard: int, captions: int = 1):
    """A folder of good shards; sample i of shard s has the number s·per_shard + i."""
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        numbers = range(s * per_shard, (s + 1) * per_shard)
        write_tar(folder / f"{s:03d}.tar", {f"{i:05d}": sample(i, captions) for i in numbers})
    return folder
