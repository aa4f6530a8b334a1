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


def test_muon_is_compiled_when_it_is_first_called_and_not_when_zero_imports_it():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout.strip() == "['zeropower_via_newtonschulz5'] torch.Size([8, 8])", done.stderr
