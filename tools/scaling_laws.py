"""Fits scaling laws to points or runs, compares families at equal compute, and says what to train with a budget.

The published study:    python tools/scaling_laws.py published --out scaling
One's own grid:         python tools/scaling_laws.py runs/study.csv --out scaling
What to train:          python tools/scaling_laws.py published --task imagenet1k --budget 10000 --gpu H100 --gpus 64 --batch 32768
"""

from dsclip.scaling.cli import main

if __name__ == "__main__":
    main()
