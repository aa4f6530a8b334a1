"""Measures the input pipeline: samples a second and core, dsclip and peers in one run.

On shards of yours:     python tools/bench_data.py --shards 'data/photos/*.tar' --image-size 224
Shards far away:        python tools/bench_data.py --latency-ms 20 --batch 1024 --workers 4
The scale of LAION-2B:  python tools/bench_data.py --plan
"""

from dsclip.bench.data_cli import main

if __name__ == "__main__":
    main()
