"""Sends a training, or all runs of a grid, to a SLURM cluster; each saves before its time is up and goes on in its next turn.

    python launchers/submit.py --nodes 4 --time 12:00:00 --sbatch=--partition=gpu --config my.yaml train.name=b32
    python launchers/submit.py --grid demo_study --at-a-time 4 --gpus-per-node 8

From the checkout, with the environment active. --print shows the command instead of running it.
"""

from dsclip.train.submit import main

if __name__ == "__main__":
    main()
