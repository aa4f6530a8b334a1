"""Starts a run again after a crash, until it is done: what `launchers/supervise.py` does."""
