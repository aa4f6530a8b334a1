"""Whole runs with the real launchers: every DeepSpeed configuration, resume, and what bad input does."""

import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPModel

from dsclip.checkpoint import read_checkpoint
from dsclip.config.deepspeed import packaged_ds_configs
from dsclip.convert.compare import difference_in_transformers
from dsclip.errors import UserError
from dsclip.evaluate.cli import _parser, evaluate
from dsclip.train.run_folder import find_resume
from tests.distributed.launch import (
    REPOSITORY,
    SMALL,
    WORKERS,
    accelerate,
    deepspeed,
    deepspeed_with_a_killed_rank,
    losses,
    metrics,
    run_ranks,
    steps,
    torchrun,
    train,
    warm,
)
from tests.programs import run_program
from tests.shard_files import sample, write_set, write_tar


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """One whole run of the demo under `deepspeed` on two ranks, ZeRO-3."""
    output = tmp_path_factory.mktemp("runs")
    done = deepspeed(*SMALL, f"train.output={output}", "train.name=whole")
    assert done.returncode == 0, done.stdout
    return output / "whole", done.stdout


def test_a_run_leaves_everything_it_promises(finished):
    run, output = finished
    for name in (
        "config.yaml",
        "ds_config.json",
        "metrics.jsonl",
        "summary.md",
        "summary.json",
        "hf/model.safetensors",
    ):
        assert (run / name).is_file(), name
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
    summary = json.loads((run / "summary.json").read_text())
    assert {"steps", "samples", "seconds", "loss", "eval", "checkpoint", "hf_export"} <= summary.keys()
    assert (summary["steps"], summary["samples"]) == (6, 192)
    assert 0 <= summary["eval"]["zeroshot"]["top1"] <= 1 and "text_to_image_recall@10" in summary["eval"]["retrieval"]
    assert "zero-shot top-1" in output and "tools/convert_hf.py" in output


def test_everything_is_logged(finished):
    run, _ = finished
    logged = steps(run)
    assert [m["step"] for m in logged] == [1, 2, 3, 4, 5, 6]
    for m in logged:
        for key in ("samples", "logit_scale", "lr", "grad_norm", "samples_per_second", "data_wait", "memory_gb",
                    "accuracy_image_to_text", "accuracy_text_to_image", "skipped_steps", "bad_samples",
                    "bad_sample_rate", "decoded_per_worker_second", "epoch"):  # fmt: skip
            assert math.isfinite(m[key]), key
    assert 0 < logged[0]["start_seconds"] < 300 and "start_seconds" not in logged[1]
    assert [m["step"] for m in metrics(run) if m.get("save_seconds", 0) > 0] == [3, 6]
    events = EventAccumulator(str(run / "tb"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 6
    assert set(events.Tags()["images"]) == {"eval/retrieval", "eval/similarity"}


def test_the_converted_checkpoint_of_two_zero3_ranks_computes_the_same(finished):
    run, _ = finished
    assert difference_in_transformers(read_checkpoint(run), run / "hf", samples=8) <= 1e-5
    assert CLIPModel.from_pretrained(run / "hf").logit_scale.item() == pytest.approx(
        math.log(read_checkpoint(run).logit_scale)
    )


def tool(script: str, *arguments) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=env)


def test_tools_print_one_json_object_and_nothing_else(finished, tmp_path):
    run, _ = finished
    done = tool("tools/convert_hf.py", run, tmp_path / "hf", "--dtype", "fp32", "--json")
    assert json.loads(done.stdout)["max_difference"] <= 1e-5, done.stderr
    results = []
    for start, model in ((tool, run), (run_program, tmp_path / "hf")):
        done = start("launchers/evaluate.py", "--model", model, "--task", "zeroshot", "--data", "demo:val", "--json")
        results.append(json.loads(done.stdout)["metrics"])
    assert results[0] == results[1] and results[0]["samples"] == 300


@pytest.mark.parametrize("task", ["zeroshot", "retrieval"])
def test_evaluation_gives_the_same_on_one_and_three_ranks(task, finished):
    options = ["--model", finished[0], "--task", task, "--data", "demo:val", "--batch-size", "37", "--json"]
    alone = json.loads(run_program("launchers/evaluate.py", *options).stdout)
    done = warm("launchers/evaluate.py", *options, ranks=3)
    together = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert together == alone


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "{tmp}", "--data", "demo:val"], "is no dsclip checkpoint"),
        (["--model", "{run}", "--data", "{tmp}"], "is no evaluation set: it holds 0 files"),
        (["--model", "{run}", "--data", "demo:val", "--output", "{tmp}/no/where.json"], "no file can be written there"),
        (["--model", "{run}", "--data", "demo:val", "--templates", "nowhere"], "nowhere is no file"),
        (["--model", "{run}", "--data", "demo:val", "--tokenizer", "/nowhere/t"], "no tokenizer at /nowhere/t"),
    ],
)
def test_wrong_evaluation_input_is_explained(arguments, message, finished, tmp_path):
    filled = [a.replace("{tmp}", str(tmp_path)).replace("{run}", str(finished[0])) for a in arguments]
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(_parser().parse_args(["--task", "zeroshot", *filled]))


def test_a_run_killed_at_a_random_step_continues_bit_for_bit(demo, tmp_path):
    """With workers, patch dropout, flips, colour jitter, bad samples, and epochs of 44 samples in batches of 32."""
    members = {f"{i:03d}": sample(i, captions=3) for i in range(44)}
    members["007"]["jpg"] = b"no picture"
    write_tar(tmp_path / "a.tar", members)
    options = [
        *SMALL, f"train.output={tmp_path}", f"data.train_shards={tmp_path}/a.tar", "data.workers=2", "data.flip=true",
        "data.color_jitter=[0.4,0.4,0.4,0.1]", "data.crop_scale=[0.5,1.0]", "model.patch_dropout=0.5", "train.export_hf=false",
        "train.save_every=1", "train.keep_checkpoints=6", "eval.every_steps=null", "eval.zeroshot_shards=null",
        "eval.retrieval_shards=null", "eval.hard_negatives_shards=null", "data.max_bad_fraction=0.5", "--resume", "auto",
    ]  # fmt: skip
    first = train(*options, "train.name=whole")
    assert first.returncode == 0, first.stdout
    logged = steps(tmp_path / "whole")
    whole = {m["step"]: (m["loss"], m["batch_hash"]) for m in logged}
    assert len(whole) == 6 and len({h for _, h in whole.values()}) == 6
    assert all(m["data_queue_depth"] >= 0 and m["bad_samples"] > 0 for m in logged[2:])
    assert logged[-1]["epoch"] == pytest.approx(6 * 32 / 44)
    step, rank, parts = random.randint(1, 3), random.randint(0, 1), tmp_path / "parts"
    saved = parts / "checkpoints" / f"step_{step:08d}"
    assert deepspeed_with_a_killed_rank(*options, "train.name=parts", rank=rank, once=saved) != 0
    assert saved.is_dir() and not (parts / "summary.json").exists(), f"rank {rank} was killed after step {step}"
    again = train(*options, "train.name=parts")
    assert again.returncode == 0, again.stdout
    resumed_at = json.loads((parts / "summary.json").read_text())["resumes"][0]["step"]
    assert step <= resumed_at < 6
    continued = {m["step"]: (m["loss"], m["batch_hash"]) for m in steps(parts)}
    assert continued == whole, f"rank {rank} was killed after step {step}; the run went on from step {resumed_at}"
    source = tmp_path / "whole"
    for name, ranks, at, ds_config in (("four", 4, 2, "zero1_bf16"), ("one", 1, 4, "zero2_bf16")):
        saved = source / "checkpoints" / f"step_{at:08d}"
        other = train(*options, f"train.name={name}", "--resume", saved, ranks=ranks, ds_config=ds_config)
        assert other.returncode == 0, other.stdout
        source = tmp_path / name
        logged = {m["step"]: m for m in steps(source)}
        expected = {step: whole[step] for step in range(at + 1, 7)}
        assert {s: m["batch_hash"] for s, m in logged.items()} == {s: batch for s, (_, batch) in expected.items()}, name
        assert [m["loss"] for m in logged.values()] == pytest.approx([loss for loss, _ in expected.values()], rel=2e-2)
    assert "written by 4 ranks with ZeRO-1, on 1 rank with ZeRO-2" in other.stdout


def test_a_second_run_into_the_same_folder_is_refused_and_nothing_is_lost(finished):
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    done = deepspeed(*SMALL, f"train.output={run.parent}", "train.name=whole")
    assert done.returncode != 0
    assert (
        "exists already. Continue it with --resume auto, or choose another folder with train.name=NAME" in done.stdout
    )
    assert "Traceback" not in done.stdout
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


@pytest.mark.parametrize("ds_config", packaged_ds_configs())
def test_every_deepspeed_configuration_runs_the_demo(ds_config, finished, tmp_path):
    run, output = finished
    if ds_config != "zero3_bf16":  # which `finished` ran
        start = torchrun if ds_config == "zero1_bf16" else train
        done = start(*SMALL, "train.export_hf=false", f"train.output={tmp_path}", ds_config=ds_config)
        assert done.returncode == 0, done.stdout
        run, output = tmp_path / "demo", done.stdout
    ours = losses(run)
    assert ours[1] == pytest.approx(losses(finished[0])[1], rel=0.05) and ours[6] < ours[1]
    output = "\n".join(line for line in output.splitlines() if "[runner.py" not in line and "[launch.py" not in line)
    for noise in ("MA 0", "CPU Virtual Memory", "bf16_optimizer", "built successfully", "[INFO]"):
        assert noise not in output


def test_accelerate_launch_gives_the_losses_of_deepspeeds_launcher(finished, tmp_path):
    done = accelerate(*SMALL, "train.export_hf=false", f"train.output={tmp_path}")
    assert done.returncode == 0, done.stdout
    assert len(losses(tmp_path / "demo")) == 6 and losses(tmp_path / "demo") == losses(finished[0])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--mixed_precision", "fp16"],
            "--mixed_precision (ACCELERATE_MIXED_PRECISION=fp16), which has no effect here",
        ),
        (["--dynamo_backend", "inductor"], "--dynamo_backend (ACCELERATE_DYNAMO_BACKEND=INDUCTOR)"),
    ],
)
def test_what_accelerate_is_told_in_vain_is_refused(options, message, demo, tmp_path):
    done = accelerate(*SMALL, f"train.output={tmp_path}", options=options, ranks=1)
    assert done.returncode != 0 and message in done.stdout and not list(tmp_path.iterdir())


def test_accumulation_gives_the_same_curve(finished, tmp_path):
    done = train(
        *SMALL, "train.export_hf=false", f"train.output={tmp_path}", "batch.micro_batch_size=6", "batch.chunk_size=4"
    )
    assert done.returncode == 0, done.stdout
    for step, loss in losses(tmp_path / "demo").items():
        assert loss == pytest.approx(losses(finished[0])[step], rel=0.02)


def test_a_run_can_start_from_a_converted_model(finished, tmp_path):
    run, _ = finished
    done = train(
        *SMALL, f"train.output={tmp_path}", f"model.init={run / 'hf'}", "train.export_hf=false", "train.steps=2"
    )
    assert done.returncode == 0, done.stdout
    # The first batch again, with the weights after six steps: an untrained model gives ln 32 = 3.47 or more.
    assert losses(tmp_path / "demo")[1] < losses(run)[1] - 0.05


def test_dry_run_shows_the_plan_and_writes_nothing(demo, tmp_path):
    done = train(*SMALL, f"train.output={tmp_path}", "--dry-run")
    assert done.returncode == 0, done.stdout
    assert "2 ranks x 16 samples" in done.stdout and "The settings fit together" in done.stdout
    assert not list(tmp_path.iterdir())


# What is wrong and a part of the sentence that says so; {run} is a finished run, {folder} has broken inputs.
LOCKED, RESUMED = ["model.init={run}", "model.lock=image"], ["--resume", "{run}"]
REFUSED = {
    "unknown recipe key": (["optim.lrr=1"], "unknown key `optim.lrr`. Did you mean `lr`"),
    "unknown DeepSpeed key": (["--ds_config", "{folder}/typo.json"], "unknown key `gradient_cliping`. Did you mean `gradient_clipping`"),
    "contradictory sizes": (["--ds_config", "{folder}/sizes.json"], "`train_batch_size` is 64, but the recipe gives 32"),
    "missing shards": (["data.train_shards={folder}/none/*.tar"], "no file matches"),
    "missing tokenizer": (["data.tokenizer={folder}/tokenizer"], "give a folder with tokenizer.json"),
    "empty shard": (["data.train_shards={folder}/0.tar"], "there is no sample in"),
    "no checkpoint": (["--resume", "{folder}"], "is no dsclip checkpoint"),
    "a rule of locked parameters": ([*LOCKED, "optim.rules=[{match: visual, lr_scale: 0.1}]"], "matches no parameter of this model that is trained"),
    "more layers than there are": ([*LOCKED, "model.unlocked_layers=99"], "nothing would be locked"),
    "a lock without weights": (["model.lock=image"], "what it locks would stay random"),
    "a kernel that a CPU lacks": (["model.attention=cudnn"], "model.attention=cudnn can't compute"),
    "products that a CPU lacks": (["model.fp8=true", "model.vision_layers=3"], "fp8 products need an NVIDIA GPU"),
    "resume with another lock": ([*RESUMED, "model.lock=image"], "was trained with model.lock=none"),
    "resume with other groups": ([*RESUMED, "optim.layer_decay=0.5"], "holds other parameter groups"),
    "resume with another model": ([*RESUMED, "model.vision_layers=3"], "holds another model: vision_layers"),
    "resume with another loss": ([*RESUMED, "loss.name=sigmoid"], "loss.name sigmoid learns a temperature and a bias"),
    "resume with another order": ([*RESUMED, "train.seed=9"], "the order of the data is not that of the checkpoint: seed was 0 and is 9"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(finished, tmp_path_factory):
    """(what each rank said in each case of REFUSED, of the run and of its dry run, the folder of their runs): one launch for all."""
    folder = tmp_path_factory.mktemp("refused")
    (folder / "0.tar").write_bytes(b"")
    packaged = json.loads((REPOSITORY / "ds_configs" / "zero3_bf16.json").read_text())
    for name, change in (("typo", {"gradient_cliping": 1.0}), ("sizes", {"train_batch_size": 64})):
        (folder / f"{name}.json").write_text(json.dumps(packaged | change))
    common = ["--config", "demo", *SMALL, f"train.output={folder}/runs"]
    cases = {case: [*common, f"train.name={case.replace(' ', '-')}", *wrong] for case, (wrong, _) in REFUSED.items()}
    text = json.dumps(cases).replace("{folder}", str(folder)).replace("{run}", str(finished[0]))
    (folder / "cases.json").write_text(text)
    run_ranks(WORKERS / "refused_worker.py", 2, folder / "said.json", folder / "cases.json")
    return json.loads((folder / "said.json").read_text()), folder / "runs"


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_ends_with_one_clear_sentence(case, refused):
    said, runs = refused
    for sentence in said[case]["run"]:
        assert REFUSED[case][1] in sentence and "Traceback" not in sentence
    assert said[case]["dry run"][0] == said[case]["run"][0]  # the others leave it to rank 0
    again = find_resume("none", runs / case.replace(" ", "-"))
    assert again is None, "corrected, the same command must not stumble over its own leftovers"


def test_bad_input_that_workers_find_ends_the_launch_with_one_clear_sentence(demo, tmp_path):
    write_tar(tmp_path / "0.tar", {f"{i}": {"jpg": b"text", "txt": b"a"} for i in range(40)})
    done = deepspeed(*SMALL, f"data.train_shards={tmp_path}/0.tar", f"train.output={tmp_path}/runs")
    assert done.returncode != 0
    assert "undecodable image" in done.stdout and "Traceback" not in done.stdout, done.stdout
    assert find_resume("none", tmp_path / "runs" / "demo") is None


def test_a_truncated_shard_is_counted_and_the_run_goes_on(demo, tmp_path):
    write_set(tmp_path / "shards", 2, 40)
    shard = tmp_path / "shards" / "000.tar"
    shard.write_bytes(shard.read_bytes()[:30_123])
    write_tar(tmp_path / "shards" / "002.tar", {"x": sample(1) | {"jpg": b"text"}})
    done = train(
        *SMALL, f"train.output={tmp_path}", f"data.train_shards={tmp_path}/shards", "eval.zeroshot_shards=null",
        "eval.retrieval_shards=null", "eval.hard_negatives_shards=null", "train.export_hf=false",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    last = steps(tmp_path / "demo")[-1]
    assert last["bad_samples/damaged shard"] >= 1 and last["bad_samples/undecodable image"] >= 1
