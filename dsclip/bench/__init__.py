"""Measurements: ours and a peer in one run, each in a process of its own."""
