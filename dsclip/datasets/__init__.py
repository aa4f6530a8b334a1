"""Making, checking and indexing data sets; the embedded one."""
