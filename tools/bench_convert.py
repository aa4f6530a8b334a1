"""Measures memory and time of converting a ZeRO-3 checkpoint of random weights.

On a laptop:   python tools/bench_convert.py --folder /tmp/bench
On a cluster:  the same, on one node; --preset ViT-bigG-14 takes 41 GB of disk.
"""

from dsclip.bench.convert import main

if __name__ == "__main__":
    main()
