"""Converts a checkpoint to an OpenCLIP folder, and checks that nothing changed.

On a laptop:   python tools/convert_openclip.py runs/demo OUT
On a cluster:  the same, on any node that sees the checkpoint; no GPU is needed.
"""

from dsclip.convert.openclip_cli import main

if __name__ == "__main__":
    main()
