"""Converts a model that dsclip, transformers or OpenCLIP wrote to the format of another of them, and checks that nothing changed.

On a laptop:   python tools/convert.py MODEL OUT --to hf|openclip|dsclip
On a cluster:  the same, on any node that sees the model; no GPU is needed.
"""

from dsclip.convert.cli import main

if __name__ == "__main__":
    main()
