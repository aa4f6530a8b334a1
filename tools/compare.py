"""Puts results of launchers/evaluate.py side by side: which differences of metrics are more than chance.

python launchers/evaluate.py --model A --task zeroshot --data SHARDS --output a.json
python launchers/evaluate.py --model B --task zeroshot --data SHARDS --output b.json
python tools/compare.py a.json b.json
"""

import sys

from dsclip.evaluate.results.compare_cli import main

if __name__ == "__main__":
    sys.exit(main())
