"""Converts a checkpoint to a HuggingFace CLIPModel folder: `tools/convert.py --to hf` by the name that runs print.

On a laptop:   python tools/convert_hf.py runs/demo OUT
On a cluster:  the same, on any node that sees the checkpoint; no GPU is needed.
"""

from dsclip.convert.cli import main

if __name__ == "__main__":
    main(to="hf")
