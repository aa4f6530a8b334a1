"""Compares every byte of checkpoints with the SHA-256 in their manifests, and loads nothing.

A run's, all of them:   python tools/verify_checkpoint.py runs/demo
One:                    python tools/verify_checkpoint.py runs/demo/checkpoints/step_00000500
"""

from dsclip.checkpoint.verify_cli import main

if __name__ == "__main__":
    main()
