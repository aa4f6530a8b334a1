"""Takes the largest changes of a fine-tune as a small file, and adds such files to their base.

On a laptop:   python tools/compose.py BASE --from TUNED --keep 0.05 --out delta.safetensors
               python tools/compose.py BASE --add one.safetensors two.safetensors --out BOTH
On a cluster:  the same, on any node that sees the models

Differences of several tasks are composed by addition: one base, a file of a few per cent a task.
"""

from dsclip.weights.compose_cli import main

if __name__ == "__main__":
    main()
