"""The recipe's section `data`."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from pydantic.dataclasses import dataclass

from dsclip.config.kinds import STRICT, Count, Interval, Jitter, Positive, Share, Weights


@dataclass(frozen=True, config=STRICT)
class DataSection:
    """Where samples come from. `demo` stands for the embedded data set and its tokenizer."""

    train_shards: str | list[str] = "demo"
    """Folder, manifest, pattern or addresses of the training shards; several entries are one set, or mixed by `weights`."""
    weights: Weights | None = None
    """Of each entry of `train_shards`, which are then mixed by draws; null: one set."""
    tokenizer: str = "auto"
    """`demo`, a local folder of a HuggingFace tokenizer, a hub name, or `auto`: that of `model.init`, `demo` without."""
    workers: Count = 2
    """Loader processes a rank; 0 decodes in the training process."""
    order: Literal["exact", "stream"] = "exact"
    """`exact`: what a batch holds depends on nothing but seed, data and batch size; `stream`: shards are read from end to end, without manifest or index, as OpenCLIP does, and a run is resumed to the shard."""
    streams: Positive | None = None
    """Virtual streams; ranks · workers must divide them; null: the largest divisor of the batch up to 1024."""
    shuffle_window: Positive = 512
    """Samples of a stream that are shuffled among themselves."""
    shuffle_unit: Positive | None = None
    """Neighbours that stay together in an epoch; null: 1, or shards beyond 2 M samples."""
    resampled: bool = False
    """Walk the samples in long runs of neighbours, lap after lap without epochs, no sample of one set without bad ones twice in a batch; with `order: stream`, draw shards with replacement."""
    decoder: Literal["fast", "exact"] = "fast"
    """`fast`: JPEG scaled while decoding, resized in uint8; `exact`: PIL, as CLIP's preprocessing."""
    crop_scale: Interval = field(default_factory=lambda: [0.9, 1.0])
    """Share of the area that a random crop keeps (CLIP, OpenCLIP)."""
    flip: bool = False
    """Horizontal flips; wrong for captions that say left or right."""
    color_jitter: Jitter | None = None
    """Brightness, contrast, saturation, hue, such as [0.32, 0.32, 0.32, 0.08]."""
    color_jitter_probability: Share = 0.8
    """Share of the images whose colours are jittered."""
    grayscale: Share = 0.0
    """Share of the images that lose their colour."""
    caption_key: str = "caption"
    """Key of the caption (string or list of strings) in `.json` members."""
    templates: str | list[str] | None = None
    """Captions are sentences with the name of a sample's class, one drawn for each: `openai`, `cifar`, a file, or sentences with {}, see [fine-tuning](finetuning.md#on-classes); null: the samples' own captions."""
    classnames: str | list[str] | None = None
    """Of the sentences: names, or a file, one name a line; null: those of the shards' manifest."""
    negative_key: str = "negatives"
    """Key of hard-negative captions in `.json`; or a `.neg.txt` member, one a line."""
    max_negatives: Positive = 4
    """Hard-negative captions used of one sample."""
    group_key: str | None = None
    """Key in `.json` whose equal values mark duplicates; null: equal captions do, and equal classes with `templates`."""
    max_bad_fraction: Share = 0.1
    """The run stops when more of the samples read can't be used."""
    max_image_pixels: Positive = 64_000_000
    """Larger images count as bad; checked on the header, before decoding."""
    max_sample_bytes: Positive = 1 << 26
    """Of a sample in its shard; larger ones are not read."""
    retries: Count = 5
    """Further attempts at a remote read, after pauses that double."""
    read_ahead_mb: Count = 512
    """Of remote shards, read and not yet used by a worker."""
    on_unreadable: Literal["stop", "skip"] = "stop"
    """What an unreadable shard does: `skip` counts its samples as bad, and data_journal.jsonl names it."""
    trusted_hosts: list[str] = field(default_factory=list)
    """Hosts (`host` or `host:port`) that may be private or plain http."""
