"""Trains a CLIP model.

On one machine:   deepspeed launchers/train.py --ds_config ds_configs/zero3_bf16.json --config demo
On a CPU:         deepspeed --num_gpus 2 launchers/train.py --ds_config ds_configs/zero3_bf16.json
On a cluster:     deepspeed --hostfile hosts launchers/train.py --ds_config ds_configs/zero3_bf16.json --config my.yaml
With torchrun:    torchrun --nproc_per_node 8 launchers/train.py --ds_config ds_configs/zero3_bf16.json
With SLURM:       python launchers/submit.py --nodes 4 --config my.yaml
With accelerate:  accelerate launch --multi_gpu --num_processes 8 launchers/train.py --ds_config ds_configs/zero3_bf16.json
"""

from dsclip.train.early_stop import end_on_signals

if __name__ == "__main__":
    end_on_signals()
    from dsclip.train.cli import main  # takes seconds, in which a signal may come

    main()
