"""Checkpoints: written atomically, verified before they are read."""

from dsclip.checkpoint.read import Checkpoint, read_checkpoint
from dsclip.checkpoint.store import CheckpointStore, complete_checkpoints, find_checkpoint, load_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "complete_checkpoints",
    "find_checkpoint",
    "load_checkpoint",
    "read_checkpoint",
]
