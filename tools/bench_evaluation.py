"""Measures how soon an evaluation set is open, and how fast its images are decoded.

50,000 small images:  python tools/bench_evaluation.py
A set of yours:       python tools/bench_evaluation.py --shards data/imagenet-val --image-size 224
Beside transformers:  python tools/bench_evaluation.py --beside-transformers 256 --repeats 2
Beside CLIP_benchmark: python tools/bench_evaluation.py --beside-clip-benchmark 256 --repeats 2
"""

from dsclip.bench.evaluation import main

if __name__ == "__main__":
    main()
