"""Suites that come with dsclip: YAML files that name their sets, where each is expected, and what counts."""
