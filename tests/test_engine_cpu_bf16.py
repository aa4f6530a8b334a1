"""bf16 products through fp32: what they are, and that gradients and other types don't notice."""

import subprocess
import sys

SCRIPT = """
import torch
from dsclip.engine.cpu_bf16 import multiply_in_fp32

torch.manual_seed(0)
a, b, c = torch.randn(70, 90), torch.randn(90, 50), torch.randn(50)
left, right, shift = torch.randn(4, 9, 20), torch.randn(4, 20, 7), torch.randn(4, 9, 7)
half = [t.bfloat16() for t in (a, b, c, left, right, shift)]
whole = [t.float() for t in half]


def products(a, b, c, left, right, shift):
    return {
        "mm": a @ b, "addmm": torch.addmm(c, a, b, beta=2, alpha=0.5), "bmm": left @ right,
        "baddbmm": torch.baddbmm(shift, left, right, beta=0, alpha=3.0),
    }


def gradients(a, b, c):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    torch.nn.functional.linear(a[None], b.T, c).square().sum().backward()
    return {"a": a.grad, "b": b.grad}


before, before_gradients = products(*whole), gradients(*half[:3])
assert multiply_in_fp32() is multiply_in_fp32()
found, expected = products(*half), products(*whole)
for name in found:
    assert found[name].dtype == torch.bfloat16 and torch.equal(expected[name], before[name]), name
    assert torch.equal(found[name], expected[name].bfloat16()), name
for name, gradient in gradients(*half[:3]).items():
    torch.testing.assert_close(gradient, before_gradients[name], rtol=2**-7, atol=2**-7 * gradient.abs().max().item())
print("all equal")
"""


def test_products_are_fp32_ones_rounded_once():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "all equal" and not done.stderr, done.stderr
