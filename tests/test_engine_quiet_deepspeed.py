"""What is corrected in DeepSpeed beside what it prints; in a process that has imported nothing else."""

import subprocess
import sys

SCRIPT = """
import sys
import torch
from dsclip.engine.quiet_deepspeed import deepspeed
from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

assert "torch._inductor.compile_fx" not in sys.modules, "importing Muon has compiled its functions"
matrix = torch.randn(8, 8)
asked = []
torch.compile = lambda function, **_: asked.append(function.__name__) or function
for _ in range(2):
    orthogonal = original_muon.zeropower_via_newtonschulz5(matrix, steps=5)
print(asked, orthogonal.shape)
"""
LOAD = """
from types import SimpleNamespace
from dsclip.engine.quiet_deepspeed import deepspeed
from deepspeed.runtime import bf16_optimizer

bf16_optimizer.dist = SimpleNamespace(get_rank=lambda **_: 0)
loaded = SimpleNamespace(load_state_dict=lambda state: print("loaded", state))
zero = SimpleNamespace(dp_process_group=None, clip_grad=0, optimizer=loaded, _link_all_hp_params=lambda: None)
saved = {bf16_optimizer.DS_VERSION: "0.19", bf16_optimizer.BASE_OPTIMIZER_STATE: 7}
bf16_optimizer.BF16_Optimizer._load_legacy_checkpoint(zero, [saved])
bf16_optimizer.print_rank_0("asked for", force=True)
"""


def test_muon_is_compiled_when_it_is_first_called_and_not_when_zero_imports_it():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.strip() == "['zeropower_via_newtonschulz5'] torch.Size([8, 8])", done.stderr


def test_a_load_under_zero_1_prints_nothing_and_what_was_asked_for_is_printed():
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["loaded 7", "asked for"], done.stderr
