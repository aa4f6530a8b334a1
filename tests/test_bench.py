"""The benches: they measure what they say, and their counts of operations are the published ones."""

import json

import pytest
import torch

from dsclip.bench import captions, step
from dsclip.bench.cli import step_main
from dsclip.bench.measure import in_process
from dsclip.bench.peers import PEERS
from dsclip.create import create_model
from dsclip.model import resolve_preset
from dsclip.model.flops import forward_flops
from tests.distributed.launch import alone
from tests.programs import run_program

# (image, text) GFLOPs of one sample, from OpenCLIP's docs/model_profile.csv.
PUBLISHED = {
    "ViT-S-32": (2.29, 3.38), "ViT-S-16": (9.20, 3.38), "ViT-M-32": (3.99, 5.96), "ViT-B-32": (8.82, 5.96),
    "ViT-B-16": (35.13, 5.96), "ViT-B-16-plus-240": (54.76, 9.27), "ViT-L-14": (162.03, 13.30), "ViT-L-14-336": (381.92, 13.30),
    "ViT-H-14": (334.59, 47.09), "ViT-g-14": (534.06, 47.09), "ViT-bigG-14": (967.50, 97.86), "ViT-e-14": (1981.35, 110.10),
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_forward_flops_are_the_published_ones(preset):
    image, text = forward_flops(resolve_preset(preset))
    assert (image / 1e9, text / 1e9) == pytest.approx(PUBLISHED[preset], abs=0.006)


def test_the_tiled_loss_takes_less_memory_than_the_dense_one():
    settings = dict(n=2048, d=64, repeats=1)
    found = {name: in_process("dsclip.bench.loss", settings | {"variant": name}) for name in ("tiled", "dense")}
    assert 0 <= found["tiled"]["extra_peak_mb"] < found["dense"]["extra_peak_mb"] / 3
    assert all(f["seconds"] > 0 for f in found.values())


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_peer_takes_steps_of_the_same_model(micro_batch):
    config = resolve_preset("demo")
    torch.manual_seed(0)
    peer, batch = PEERS["transformers"](config, micro_batch), step.make_batch(config, 8, 0)
    assert sum(p.numel() for p in peer.model.parameters()) == create_model("demo").parameter_count() + 1, "and a scale"
    torch.manual_seed(0)
    plain = PEERS["transformers"](config, None)
    losses = [peer.step(batch).item() for _ in range(3)]
    assert losses[0] == pytest.approx(plain.step(batch).item(), abs=0.02), "the loss of the whole batch, in bf16"
    assert losses[2] < losses[0] - 0.05, "the same batch again, after two steps"


def test_batches_have_captions_of_real_length():
    config = resolve_preset("ViT-B-32")
    tokens = step.make_batch(config, 50, 0).tokens
    ends = (tokens == config.eot_token_id).int().argmax(1)
    assert (tokens == config.eot_token_id).sum(1).tolist() == [1] * 50
    assert 8 <= ends.min() and ends.max() < 22
    create_model("demo")(step.make_batch(resolve_preset("demo"), 2, 0).images, None)


@pytest.mark.parametrize("arguments", ["--batch 0", "--chunk-size 0", "--micro-batch -1", "--checkpointing some"])
def test_sizes_that_no_step_can_have_are_refused_before_anything_is_measured(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        step_main(arguments.split())
    assert left.value.code == 2 and arguments.split()[0] in capsys.readouterr().err


def test_bench_loss_prints_one_json_object():
    done = run_program("tools/bench_loss.py", "--n", "512", "--d", "32", "--repeats", "1", "--json")
    result = json.loads(done.stdout)
    assert {"seconds", "extra_peak_mb"} <= result["tiled"].keys() & result["dense"].keys()


def test_bench_loss_shows_that_a_ring_of_ranks_takes_less_memory():
    done = run_program(*"tools/bench_loss.py --n 2048 --d 2048 --repeats 1 --skip-dense --ranks 4 --json".split())
    result = json.loads(done.stdout)
    features = 2 * 2048 * 2048 * 4 / 1e6  # those of all, 34 MB, against two blocks of a quarter
    assert result["ring"]["extra_peak_mb"] < result["all"]["extra_peak_mb"] - 0.25 * features
    done = run_program(*"tools/bench_loss.py --n 512 --ranks 3 --json".split())
    assert done.returncode == 2 and "--ranks is 3" in json.loads(done.stdout)["error"]


def test_bench_save_shows_that_training_waits_for_a_copy_and_the_commit_alone(tmp_path):
    with alone():  # whatever the tool leaves in this process is gone with it
        done = run_program(*f"tools/bench_save.py --preset demo --repeats 1 --folder {tmp_path}/saved --json".split())
    result = json.loads(done.stdout)
    assert result["gb"] > 0.09 and not (tmp_path / "saved").exists(), "8 M parameters of 14 bytes, more or less"
    assert result["stall_seconds"] == pytest.approx(result["copying_seconds"] + result["looking_seconds"])


def test_bench_captions_counts_the_tokens_of_both_ways():
    found = captions.measure("demo", batch=64, chunk_size=16, repeats=1)
    assert found["needed_tokens"] <= found["sorted"]["tokens_per_caption"] < found["unsorted"]["tokens_per_caption"]
    ends = captions.web_captions(100_000, 300, torch.Generator().manual_seed(0)) - 1.0
    assert ends.mean().item() == pytest.approx(20.2, rel=0.02) and ends.std().item() == pytest.approx(16.3, rel=0.05)
