"""Converts a checkpoint to a HuggingFace CLIPModel folder, and checks that nothing changed.

On a laptop:   python tools/convert_hf.py runs/demo OUT
On a cluster:  the same, on any node that sees the checkpoint; no GPU is needed.
"""

from dsclip.convert.cli import main

if __name__ == "__main__":
    main()
