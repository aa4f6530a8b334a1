"""Evaluates a checkpoint or a converted model.

On a laptop:   python launchers/evaluate.py --model runs/demo --task zeroshot --data demo:val
On many GPUs:  torchrun --nproc_per_node 8 launchers/evaluate.py --model runs/demo --task retrieval --data demo:val
"""

from dsclip.evaluate.cli import main

if __name__ == "__main__":
    main()
