"""Checkpoints: written atomically, verified before they are read."""

from dsclip.checkpoint.fits import check_fits
from dsclip.checkpoint.lineage import Lineage, complete_checkpoints, newest_checkpoint
from dsclip.checkpoint.load import find_checkpoint, load_checkpoint, load_verified
from dsclip.checkpoint.manifest import Manifest, read_manifest
from dsclip.checkpoint.read import Checkpoint, read_checkpoint
from dsclip.checkpoint.store import CheckpointStore, NoRoom, NotSaved

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Lineage",
    "Manifest",
    "NoRoom",
    "NotSaved",
    "check_fits",
    "complete_checkpoints",
    "find_checkpoint",
    "load_checkpoint",
    "load_verified",
    "newest_checkpoint",
    "read_checkpoint",
    "read_manifest",
]
