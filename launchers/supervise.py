"""Starts a training command again after every crash, until its run is done.

    python launchers/supervise.py -- deepspeed launchers/train.py --ds_config ds_configs/zero3_bf16.json --config my.yaml

Journal and effective training time ratio are in the run's folder: supervisor.jsonl, supervisor.json.
"""

from dsclip.train.supervisor.cli import main

if __name__ == "__main__":
    main()
