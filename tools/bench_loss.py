"""Measures the loss with its gradients: dsclip and a peer in one run.

On a laptop:   python tools/bench_loss.py --n 8192 --d 512
On a GPU:      the same; sizes such as --n 65536 --d 768 --skip-dense
"""

from dsclip.bench.cli import loss_main

if __name__ == "__main__":
    loss_main()
