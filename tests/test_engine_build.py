"""What an engine leaves behind in the process beside itself."""

import torch

from tests.distributed.exactness_worker import build
from tests.distributed.launch import alone


def test_torchs_linear_stays_torchs_under_zero_3():
    """DeepSpeed's would save its inputs after the product: what is run again for backward could not stop before it."""
    with alone() as group:
        build(3, micro_batches=1, chunks=1, patch_dropout=0.0, bf16=False, group=group).close()
    assert torch.nn.functional.linear is torch._C._nn.linear
