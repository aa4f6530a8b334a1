"""Measures all that needs a GPU in one run: exactness, steps, blocks, loss, memory, input, the main job, and peers.

With ten minutes:   python tools/bench_gpu.py --minutes 10
Without a GPU:      python tools/bench_gpu.py --device cpu --tiny   (whether the bench itself works)
"""

from dsclip.bench.gpu.cli import main

if __name__ == "__main__":
    main()
