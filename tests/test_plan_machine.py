"""What a plan takes for the machine: the memory of the GPU that was named, or what is free on this one; and its words."""

import argparse
import subprocess
import sys
import time

import psutil
import pytest

from dsclip.errors import UserError
from dsclip.plan.cli import main, plan
from dsclip.plan.free_memory import free_bytes
from dsclip.plan.machine import datasheet_tflops, named_gpu, this_machine
from dsclip.plan.reliability_cli import OPTIONS


@pytest.mark.parametrize(
    ("name", "memory_gb", "tflops"),
    [
        ("L4", 24, 121), ("l40s", 48, 362), ("L40", 48, 181), ("A10", 24, 125), ("A100", 80, 312), ("A100-40GB", 40, 312),
        ("NVIDIA H100 80GB HBM3", 80, 989), ("RTX4090", 24, 165), ("NVIDIA GH200 480GB", 96, 989),
    ],
)  # fmt: skip
def test_a_named_gpu_has_its_own_memory_and_peak(name, memory_gb, tflops):
    machine = named_gpu(name)
    assert (machine.memory_gb, machine.tflops) == (memory_gb, tflops)
    assert named_gpu(name, memory_gb=20).memory_gb == 20


def test_an_unknown_gpu_lists_the_known_ones_and_plans_with_what_is_given():
    with pytest.raises(UserError, match="B9000 is not known here.*Known: B200, H200.*--memory-gb and --peak-tflops"):
        named_gpu("B9000", memory_gb=40)
    assert named_gpu("B9000", 40, 1000).memory_gb == 40
    assert datasheet_tflops("NVIDIA A10G") is None, "no part of a name is taken for a name"


def printed(capsys, *arguments):
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_plan_names_the_gpu_and_counts_in_words(capsys):
    text = printed(capsys, "--gpu", "L4", "--gpus", "8", "--preset", "ViT-B-32", "--batch", "512")
    assert "on 8 × L4:" in text and "of 24,000 MB" in text
    assert "1 all-gather of" in text and "1 reduction of" in text
    assert "on 2 ranks of this machine's CPU" in printed(capsys, "--gpus", "2", "--preset", "demo", "--batch", "16")


def test_when_a_batch_does_not_fit_a_smaller_one_is_offered_that_does(capsys):
    arguments = ["--gpu", "L4", "--preset", "ViT-L-14", "--batch", str(2**19)]
    text = printed(capsys, *arguments)
    assert "It does not fit. What would:" in text
    size = text.split("a global batch of ")[1].split(",")[0]
    assert "It does not fit" not in printed(capsys, *arguments[:-1], size)


def test_a_cpu_is_planned_with_what_is_free_when_the_plan_is_made():
    hold = "x = bytearray(1 << 30); x[::4096] = b'1' * len(x[::4096]); print(flush=True); input()"
    taken = []
    for _ in range(4):  # other processes come and go
        time.sleep(1)  # the system takes a moment to take back what a process had
        before = this_machine(ranks=2)
        with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            taken.append(before.memory_gb - this_machine(ranks=2).memory_gb)
            other.stdin.write(b"\n")
        if taken[-1] == pytest.approx((1 << 30) / 1e9 / 2, abs=0.25):
            return
    raise AssertionError(f"each of two ranks should have half a GiB less: {taken}")


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts_also_above_its_own_group(tmp_path, version):
    (tmp_path / "proc/self").mkdir(parents=True)
    assert free_bytes(tmp_path) == pytest.approx(psutil.virtual_memory().available, abs=1e9), "no limit"
    entry, mount, limit, usage, stat = (
        ("4:cpu,memory:/pod/c1\n", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("0::/pod/c1\n", "", "memory.max", "memory.current", "inactive_file")
    )
    (tmp_path / "proc/self/cgroup").write_text(entry)
    for folder, bound, used in (("pod", 8 << 26, 5 << 26), ("pod/c1", "max" if version == 2 else 1 << 62, 1 << 26)):
        group = tmp_path / "sys/fs/cgroup" / mount / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{bound}\n")
        (group / usage).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\n{stat} {1 << 26}\n")
    assert free_bytes(tmp_path) == 4 << 26, "limit less usage, caches that can be dropped added back"


def test_towers_of_a_hundred_thousand_layers_are_refused_at_once():
    started = time.process_time()
    arguments = argparse.Namespace(
        preset="ViT-B-32", config=None, ds_config="zero3_bf16", gpus=1, batch=None, micro_batch=None, chunk_size=None,
        checkpointing=None, gpu="H100", memory_gb=None, peak_tflops=None, efficiency=None, bandwidth=None, text_tokens=None,
        nodes=None, gpus_per_node=None, interconnect=None, figure=None, reliability=False, **dict.fromkeys(OPTIONS),
        overrides=["model.vision_layers=100000"],
    )  # fmt: skip
    with pytest.raises(UserError, match="`model.vision_layers` is 100000"):
        plan(arguments)
    assert time.process_time() - started < 2
