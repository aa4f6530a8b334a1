"""Measures what training waits for a checkpoint: written at once, and copied and written in the background, in one run.

On a laptop:   python tools/bench_save.py --preset ViT-B-32 --folder /tmp/bench
On a cluster:  the same, on a GPU and the file system that runs write to.
"""

from dsclip.bench.save import main

if __name__ == "__main__":
    main()
