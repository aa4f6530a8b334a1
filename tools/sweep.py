"""Trains the runs of a grid one after another, or writes them as a SLURM job array; goes on where it was stopped.

What there is:        python tools/sweep.py demo_study --list
On this machine:      python tools/sweep.py demo_study
On a cluster:         python tools/sweep.py laion2023 --launch "srun python" --slurm study.sbatch
"""

from dsclip.scaling.sweep_cli import main

if __name__ == "__main__":
    main()
