"""Averages the weights of several fine-tunes of one model: all, greedily, or along the line between two.

On a laptop:   python tools/soup.py A B C --out SOUP --greedy --task zeroshot --data demo:val
On a cluster:  the same, on any node that sees the models

With --interpolate 11 it is WiSE-FT (Wortsman et al. 2022): from the zero-shot model to its fine-tune in ten steps, the best is kept.
"""

from dsclip.weights.soup_cli import main

if __name__ == "__main__":
    main()
