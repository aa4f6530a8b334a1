"""The scaling laws as a laboratory: points, laws with intervals, what to train next; grids of runs that give the points."""
