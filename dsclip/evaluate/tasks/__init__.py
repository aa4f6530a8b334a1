"""What is measured: a task is a file here, and a line in `registry.py`."""
