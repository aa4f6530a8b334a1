"""The shard sets that a recipe names, opened, and the order in which their samples make batches."""

from __future__ import annotations

from collections.abc import Sequence

from dsclip.config.data_section import DataSection
from dsclip.data.order.exact import Order, SetOrder, check_split, default_streams
from dsclip.data.order.shards import ShardOrder, check_readers
from dsclip.data.reading.open_shards import check_copies_fit
from dsclip.data.shards.identity import check_sizes
from dsclip.data.shards.shard_set import ShardSet, named_shards, open_shards, told_apart
from dsclip.data.shards.specification import resolve_shards
from dsclip.data.sources.storage import Storage
from dsclip.errors import UserError


def ordered_sets(
    data: DataSection, storage: Storage, global_batch_size: int, seed: int, world_size: int
) -> tuple[Order | ShardOrder, list[ShardSet]]:
    """The order that `data` asks for, and the sets that are mixed in it. Raises UserError for sets that can't be read."""
    check_order(data, global_batch_size, world_size, storage)
    if data.order == "exact":
        return _exact_order(data, storage, global_batch_size, seed)
    return _shard_order(data, storage, seed, world_size)


def check_order(data: DataSection, global_batch_size: int, world_size: int, storage: Storage) -> None:
    """Raises UserError when the ranks and their workers can't share the data in the order that `data` asks for."""
    if data.order == "exact":
        streams = data.streams or default_streams(global_batch_size)
        check_split(streams, global_batch_size, world_size, data.workers)
        return
    for name in ("weights", "streams", "shuffle_unit"):
        if getattr(data, name) is not None:
            raise UserError(f"data.{name} needs data.order=exact; with stream, shards are read from end to end")
    check_readers(len(resolve_shards(data.train_shards, storage)), global_batch_size, world_size, data.workers)


def data_sets(data: DataSection) -> Sequence[str | list[str]]:
    """The shard specifications that are mixed: one without weights, and one for each weight."""
    if data.weights is None:
        return [data.train_shards]
    parts = [data.train_shards] if isinstance(data.train_shards, str) else data.train_shards
    if len(parts) != len(data.weights):
        raise UserError(
            f"data.weights has {len(data.weights)} values and data.train_shards {len(parts)} entries; give one for each"
        )
    return parts


def _exact_order(
    data: DataSection, storage: Storage, global_batch_size: int, seed: int
) -> tuple[Order, list[ShardSet]]:
    """Of samples."""
    streams = data.streams or default_streams(global_batch_size)
    sets = told_apart([open_shards(spec, storage) for spec in data_sets(data)])
    for shards, spec in zip(sets, data_sets(data), strict=True):
        if not shards.samples.sum():
            reasons = ", ".join(f"{n} {reason}" for reason, n in shards.problems.items()) or "they are empty"
            raise UserError(f"there is no sample in {spec} ({reasons})")
        check_copies_fit(shards, storage)
        check_sizes(shards, storage, skip=data.on_unreadable == "skip")
    set_orders = [
        SetOrder(
            shards.samples, global_batch=global_batch_size, streams=streams, seed=seed, window=data.shuffle_window,
            unit=data.shuffle_unit, resampled=data.resampled,
        )
        for shards in sets
    ]  # fmt: skip
    return Order(set_orders, data.weights, streams, seed), sets


def _shard_order(data: DataSection, storage: Storage, seed: int, world_size: int) -> tuple[ShardOrder, list[ShardSet]]:
    """Of whole shards, one stream a worker of a rank, and the one set that they are."""
    shards = named_shards(data.train_shards, storage)
    return ShardOrder(len(shards.locations), world_size * max(1, data.workers), seed, data.resampled), [shards]
