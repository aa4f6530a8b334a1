"""A training run: loop, evaluation on the way, and what people see of it."""
