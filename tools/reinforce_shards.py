"""Writes a recipe's training shards again, with a teacher's features in every sample.

On a laptop:   python tools/reinforce_shards.py runs/big data/reinforced --config recipe.yaml --passes 10
On a cluster:  run it once, on the file system that all nodes share.
"""

from dsclip.train.reinforce_cli import main

if __name__ == "__main__":
    main()
