"""Prints what a step takes before it is run: memory by part, gathers, operations, and what to change.

For this machine:     python tools/plan.py --preset ViT-B-32 --batch 256
For GPUs elsewhere:   python tools/plan.py --preset ViT-bigG-14 --gpus 64 --batch 32768 --gpu H100
"""

from dsclip.plan.cli import main

if __name__ == "__main__":
    main()
