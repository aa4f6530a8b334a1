"""Which samples make a global batch: pure functions, no file is opened."""
