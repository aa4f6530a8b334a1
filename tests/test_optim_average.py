"""The average of the weights on one rank: written by a run, read by other sizes of it, converted and evaluated."""

from dataclasses import asdict, replace

import pytest
import torch

from dsclip.checkpoint import CheckpointStore, load_checkpoint, read_checkpoint
from dsclip.config.schema import BatchSection, ModelSection, OptimSection, Recipe, TrainSection
from dsclip.convert import cli
from dsclip.convert.source import open_source
from dsclip.distributed import Collectives
from dsclip.engine.contrastive import ContrastiveEngine
from dsclip.engine.whole_tensors import whole_weights
from dsclip.errors import UserError
from dsclip.evaluate.cli import _parser, evaluate
from dsclip.optim.average import PATTERN, WeightAverage
from dsclip.optim.flat import FlatVector, Piece
from dsclip.saving import WriteNow
from tests.distributed.checkpoint_worker import NoTokenizer
from tests.distributed.exactness_worker import CONFIG, GLOBAL_BATCH, ds_config, global_batch
from tests.distributed.launch import alone


def build(ema, config=CONFIG, optimizer="adamw", **model):
    optim = OptimSection(name=optimizer, lr=1e-2, warmup_steps=0, ema=ema)
    recipe = Recipe(
        model=ModelSection(**model),
        batch=BatchSection(GLOBAL_BATCH),
        optim=optim,
        train=TrainSection(steps=10, compile="off"),
    )
    return ContrastiveEngine(recipe, ds_config(3, True, 1), config)


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    """Of three steps with an average, and of three without."""
    run = tmp_path_factory.mktemp("averaged")
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id)
    with alone():
        found = []
        for ema in (0.9, None):
            engine = build(ema, config)
            for step in range(3):
                batch = global_batch(step)
                ended = torch.where(batch.tokens == CONFIG.eot_token_id, tokenizer.eot_token_id, batch.tokens)
                engine.train_step(replace(batch, tokens=ended))
            store = CheckpointStore(run / str(ema), keep=1, tokenizer=tokenizer)
            found.append(store.save(engine, {}, asdict(engine.recipe)))
            engine.close()
    return found


def test_a_checkpoint_is_converted_and_evaluated_with_its_average(checkpoint, tmp_path):
    averaged, plain = read_checkpoint(checkpoint[0], average=True), read_checkpoint(checkpoint[0])
    different = [n for n, w in plain.state_dict.items() if not torch.equal(w, averaged.state_dict[n])]
    assert len(different) == len(plain.state_dict) and averaged.logit_scale != plain.logit_scale
    with pytest.raises(SystemExit) as done:
        cli.main([str(checkpoint[0]), str(tmp_path / "hf"), "--ema"], to="hf")
    assert done.value.code == 0
    back = open_source(tmp_path / "hf").weights()
    assert all(torch.equal(w, averaged.state_dict[n]) for n, w in back)
    assert "moving average" in (tmp_path / "hf" / "README.md").read_text()
    data = ["--task", "retrieval", "--data", "demo:val", "--max-samples", "30"]
    by_hand = evaluate(_parser().parse_args(["--model", str(tmp_path / "hf"), *data]))
    found = evaluate(_parser().parse_args(["--model", str(checkpoint[0]), "--ema", *data]))
    other = evaluate(_parser().parse_args(["--model", str(checkpoint[0]), *data]))
    hashes = [r["protocol"]["model"]["weights_sha256"] for r in (by_hand, found, other)]
    assert found["metrics"] == by_hand["metrics"] and hashes[0] == hashes[1] != hashes[2]


def test_an_average_that_is_not_there_is_said(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"has no average of the weights: it was trained without optim.ema"):
        read_checkpoint(checkpoint[1], average=True)
    (tmp_path / "weights.pt").touch()
    with pytest.raises(UserError, match=r"--ema: .*weights.pt is no checkpoint of a dsclip run"):
        open_source(tmp_path / "weights.pt", average=True)


def test_a_run_that_had_none_begins_its_average_with_its_weights(checkpoint, tokenizer):
    with alone():
        config = replace(CONFIG, vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id)
        engine = build(0.9, config)
        load_checkpoint(engine, checkpoint[1], world_size=1)
        weights = read_checkpoint(checkpoint[1]).state_dict
        assert all(torch.equal(x, weights[n].flatten()) for n, x in engine._average.pieces().items())
        engine.close()


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_room_is_asked_for_the_state_that_is_written(name, tmp_path):
    with alone():
        engine = build(0.9, optimizer=name)
        engine.train_step(global_batch(0))
        path = CheckpointStore(tmp_path, keep=1, tokenizer=NoTokenizer()).save(engine, {}, asdict(engine.recipe))
        asked = engine.bytes_to_save()
        engine.close()
    written = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert 0.8 < asked / written <= 1.25, (asked, written)


def test_adapters_are_averaged_and_then_merged(tmp_path):
    with alone():
        engine = build(0.9, lora_rank=2)
        for step in range(2):
            engine.train_step(global_batch(step))
        path = CheckpointStore(tmp_path, keep=1, tokenizer=NoTokenizer()).save(engine, {}, asdict(engine.recipe))
        averages, name = engine._average.pieces(), "visual.blocks.0.attn.qkv"
        down, up = averages[f"{name}.lora.down"].view(2, -1), averages[f"{name}.lora.up"].view(-1, 2)
        start = whole_weights(engine)[f"{name}.weight"]
        scale = engine.recipe.model.lora_scale
        engine.close()
    read = read_checkpoint(path, average=True).state_dict
    assert torch.equal(read[f"{name}.weight"], start + scale * (up @ down)) and up.abs().max() > 0
    assert not torch.equal(read[f"{name}.weight"], read_checkpoint(path).state_dict[f"{name}.weight"])


def cut(ranks: int, sharded: bool) -> list[FlatVector]:
    """Three tensors as a rank of so many holds them: under ZeRO-3 a part of each, else a stretch of all."""
    shapes = [torch.Size(s) for s in ((5, 3), (7,), (4, 4))]
    names, total = ["a", "b", "c"], 38
    vectors = []
    for rank in range(ranks):
        pieces, offset, begin = [], 0, 0
        for tensor, shape in enumerate(shapes):
            n = shape.numel()
            if sharded:
                share = -(-n // ranks)
                start, stop = rank * share, min(n, (rank + 1) * share)
                place, offset = offset, offset + share
            else:
                share = -(-total // ranks)
                start, stop = max(0, rank * share - begin), min(n, (rank + 1) * share - begin)
                place = begin + start - rank * share
            begin += n
            if start < stop:
                pieces.append(Piece(tensor, start, stop - start, place))
        everything = [[]] * ranks
        everything[rank] = pieces
        group = Collectives(rank, ranks)
        vectors.append(FlatVector(torch.zeros(offset if sharded else share), names, shapes, everything, group))
    return vectors


@pytest.mark.parametrize("saved", [(1, True), (3, True), (2, False), (3, False)])
@pytest.mark.parametrize("loaded", [(2, True), (4, True), (1, False), (5, False)])
def test_it_is_read_by_any_number_of_ranks_in_any_stage(saved, loaded, tmp_path):
    whole = torch.arange(38.0)
    values = dict(zip("abc", whole.split([15, 7, 16]), strict=True))
    for v in cut(*saved):
        for p in v.own:
            v.numbers.narrow(0, p.offset, p.numel).copy_(values[v.names[p.tensor]].narrow(0, p.start, p.numel))
        state = WeightAverage([v], {}, 0.9).save(WriteNow(), tmp_path, v.group.rank)
    assert len(list(tmp_path.glob(PATTERN))) == saved[0]
    found = {name: [] for name in values}
    for v in cut(*loaded):
        average = WeightAverage([v], {}, 0.9)
        average.load(tmp_path, state)
        for name, piece in average.pieces().items():
            found[name].append(piece)
    assert all(torch.equal(torch.cat(found[name]), values[name]) for name in values)
