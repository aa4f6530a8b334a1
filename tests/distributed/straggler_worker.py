"""`launchers/train.py`, but rank 1 sleeps before each of its batches, and for good before a certain one.

Arguments: the seconds, the number of that batch, then those of the launcher.
"""

import os
import sys
import time

from dsclip.train import cli, loop

on_device = loop.on_device


def slowly(batches, device):
    """The same batches, late."""
    for number, batch in enumerate(on_device(batches, device), 1):
        time.sleep(float(sys.argv[1]) if number < int(sys.argv[2]) else 1e6)
        yield batch


if os.environ["RANK"] == "1":
    loop.on_device = slowly
cli.main(sys.argv[3:])
