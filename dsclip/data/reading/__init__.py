"""Reading samples in their order: open shards, reading ahead, workers."""
