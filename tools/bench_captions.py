"""Measures what sorting captions by length gives, on lengths as CC12M has them.

On a laptop:   python tools/bench_captions.py --preset ViT-B-32 --batch 64
On a GPU:      the same; sizes such as --batch 1024
"""

from dsclip.bench.captions import captions_main

if __name__ == "__main__":
    captions_main()
