"""Writes an index for each shard and a manifest for the set.

Example:  python tools/index_shards.py data/cc12m
"""

from dsclip.datasets.inspect_cli import index_main

if __name__ == "__main__":
    index_main()
