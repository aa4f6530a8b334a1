"""Measures whole optimizer steps: dsclip and a peer in one run.

On a laptop:   python tools/bench_step.py --preset ViT-B-32 --batch 64 --micro-batch 16
On a GPU:      the same; sizes such as --preset ViT-L-14 --batch 1024 --micro-batch 256
"""

from dsclip.bench.cli import step_main

if __name__ == "__main__":
    step_main()
