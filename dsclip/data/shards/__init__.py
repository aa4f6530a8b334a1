"""Shard sets: how they are named, listed, indexed, written and told apart."""
