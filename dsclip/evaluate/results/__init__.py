"""What a task returns: values, their intervals, the protocol record, and comparisons."""
