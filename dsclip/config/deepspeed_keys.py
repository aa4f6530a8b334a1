"""The keys of a DeepSpeed JSON: those that a dsclip run obeys, with their kinds, and those it refuses, with the reason.

Lists, because DeepSpeed takes seconds to import and reads half of its sections without checking them. Together they name
every key of DeepSpeed 0.19.8's own models; tests/test_config_deepspeed_keys.py compares, so that an update shows what is new.
"""

from __future__ import annotations

Kind = type | tuple[type, ...]
NUMBER = (int, float)

# Section -> key -> kind. A dictionary's keys are those of the section SECTION.KEY.
OBEYED: dict[str, dict[str, Kind]] = {
    "": {
        "train_batch_size": int, "train_micro_batch_size_per_gpu": int, "gradient_accumulation_steps": int,
        "bf16": dict, "fp16": dict, "zero_optimization": dict, "data_types": dict, "comms_logger": dict, "timers": dict,
        "communication_data_type": str, "gradient_clipping": NUMBER, "gradient_predivide_factor": NUMBER,
        "zero_allow_untested_optimizer": bool, "zero_force_ds_cpu_optimizer": bool, "log_level": str, "steps_per_print": NUMBER,
        "wall_clock_breakdown": bool, "memory_breakdown": bool, "dump_state": bool,
    },
    "bf16": {"enabled": bool, "immediate_grad_update": bool, "check_grad_overflow": bool},
    "fp16": {
        "enabled": bool, "auto_cast": bool, "loss_scale": NUMBER, "initial_scale_power": NUMBER, "min_loss_scale": NUMBER,
        "loss_scale_window": NUMBER, "hysteresis": NUMBER, "consecutive_hysteresis": bool,
        "fp16_master_weights_and_grads": bool,
    },  # of a block that is not enabled; see `_check_precision_and_stage`
    "data_types": {"grad_accum_dtype": str},
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "timers": {"throughput": dict},
    "timers.throughput": {"enabled": bool, "synchronized": bool},
    "zero_optimization": {
        "stage": int, "contiguous_gradients": bool, "reduce_scatter": bool, "reduce_bucket_size": NUMBER,
        "use_multi_rank_bucket_allreduce": bool, "allgather_partitions": bool, "allgather_bucket_size": NUMBER,
        "overlap_comm": bool, "offload_param": dict, "offload_optimizer": dict, "sub_group_size": NUMBER,
        "stage3_prefetch_bucket_size": NUMBER, "stage3_param_persistence_threshold": NUMBER,
        "stage3_model_persistence_threshold": NUMBER, "stage3_max_live_parameters": NUMBER,
        "stage3_max_reuse_distance": NUMBER, "stage3_use_all_reduce_for_fetch_params": bool,
        "stage3_allgather_sequential": bool, "ignore_unused_parameters": bool, "round_robin_gradients": bool,
        "parameter_alignment": bool, "zero_hpz_partition_size": int, "memory_efficient_linear": bool,
        "override_module_apply": bool, "log_trace_cache_warnings": bool, "enable_sanity_checks": bool,
        "pipeline_loading_checkpoint": bool,
    },
    "zero_optimization.offload_param": {"device": str, "pin_memory": bool},
    "zero_optimization.offload_optimizer": {"device": str, "pin_memory": bool},
}  # fmt: skip

CHOICES = {
    "communication_data_type": ("fp32", "bf16"),
    "data_types.grad_accum_dtype": ("fp32", "bf16"),
    "log_level": ("debug", "info", "warning", "error", "critical"),
    "zero_optimization.offload_param.device": ("none", "cpu"),
    "zero_optimization.offload_optimizer.device": ("none", "cpu"),
}

# Keys that DeepSpeed obeys at these stages alone, beside those whose names begin with `stage3_`.
STAGES = {
    "offload_param": (3,), "sub_group_size": (3,), "zero_hpz_partition_size": (3,), "memory_efficient_linear": (3,),
    "override_module_apply": (3,), "log_trace_cache_warnings": (3,), "enable_sanity_checks": (3,),
    "pipeline_loading_checkpoint": (3,), "round_robin_gradients": (1, 2), "parameter_alignment": (1, 2),
    "ignore_unused_parameters": (1, 2), "use_multi_rank_bucket_allreduce": (1, 2), "allgather_partitions": (1, 2),
    "allgather_bucket_size": (1, 2),
}  # fmt: skip

_GONE = "DeepSpeed 0.19.8 has it no more"
_OWN_READER = "dsclip reads data itself, and DeepSpeed's data loader is not used"
_WATCHED = "dsclip writes metrics.jsonl and TensorBoard files to the run's folder; DeepSpeed would log a part's surrogate as the loss"
_CHECKPOINTS = "dsclip writes checkpoints itself, and verifies them"
NVME = "dsclip offloads to host memory only (device: cpu); its checkpoints can't verify states on NVMe"
_MASTER = "dsclip's master weights and gradients are fp32, from which a checkpoint is put together"
_WHOLE = "dsclip has only been tried with the whole optimizer in host memory"
_EIGHT_BITS = "weights or gradients of 8 bits would not give the exact step"
_NO_EXPERTS = "dsclip's towers have no experts"
_MICS = f"MiCS: {_GONE}; zero_hpz_partition_size keeps a copy of the weights within a node"
_FLOPS = "tools/plan.py counts a step's operations, and tools/bench_step.py measures them"

REFUSED: dict[str, dict[str, str]] = {
    "": {
        "optimizer": "the recipe's `optim` section chooses the optimizer",
        "scheduler": "the recipe's `optim` section sets the learning rate: lr, warmup_steps, schedule",
        "activation_checkpointing": "set `batch.checkpointing` (none, selective, full, offload) in the recipe; DeepSpeed's is not used",
        "dataloader_drop_last": f"{_OWN_READER}; its global batches are always whole",
        "data_efficiency": _OWN_READER,
        "curriculum_learning": f"{_GONE}; {_OWN_READER}",
        "managed_gradient_accumulation": "dsclip splits a batch itself: `batch.micro_batch_size` in the recipe",
        "gradient_allreduce_op": "gradients are averaged over ranks, and a sum would be another gradient",
        "prescale_gradients": "DeepSpeed refuses it with reduce_scatter; `gradient_predivide_factor` does the same",
        "amp": f"NVIDIA's apex: {_GONE}; use bf16",
        "torch_autocast": "use bf16: its fp32 master weights give the same precision",
        "bfloat16": "this is the old name of `bf16`; write that",
        "pipeline": "use ZeRO stage 3 to shard the model",
        "tensor_parallel": "use ZeRO stage 3 to shard the model",
        "sequence_parallel_size": "CLIP's sequences are short; use ZeRO stage 3 to shard the model",
        "seq_parallel_communication_data_type": "dsclip has no sequence parallelism",
        "expert_parallel": _NO_EXPERTS,
        "use_data_before_expert_parallelism": _NO_EXPERTS,
        "hybrid_engine": "it is meant for text generation",
        "weight_quantization": "it is meant for inference; convert the checkpoint with tools/convert_hf.py first",
        "compression_training": f"{_GONE}; train in bf16 and compress the converted model",
        "quantize_training": f"{_GONE}; train in bf16 and quantise the converted model",
        "eigenvalue": _GONE,
        "sparse_attention": _GONE,
        "sparse_gradients": f"{_GONE}; gradients of embeddings are reduced dense",
        "graph_harvesting": f"{_GONE}; `train.compile` compiles the blocks",
        "compile": "`train.compile` in the recipe compiles the blocks; DeepCompile is not used",
        "progressive_layer_drop": f"{_GONE}; use `model.patch_dropout` to train faster",
        "elasticity": f"{_GONE}; a run continues with any number of ranks (`--resume`)",
        "nebula": f"{_GONE}; {_CHECKPOINTS}",
        "checkpoint": _CHECKPOINTS,
        "datastates_ckpt": _CHECKPOINTS,
        "aio": NVME,
        "autotuning": "`batch.accumulation: auto` plans a step, and tools/plan.py shows the plan",
        "flops_profiler": _FLOPS,
        "tensorboard": _WATCHED,
        "csv_monitor": _WATCHED,
        "wandb": _WATCHED,
        "comet": _WATCHED,
        "disable_python_gc": "nothing in dsclip would collect garbage in its place",
        "vocabulary_size": "the tokenizer says how many tokens there are",
        "disable_allgather": "DeepSpeed 0.19.8 reads it and does nothing with it",
    },
    "bf16": {"bf16_master_weights_and_grads": _MASTER, "bf16_optimizer_states": _MASTER},
    "data_types": {
        "param_dtype": "`bf16.enabled` decides on it",
        "buffer_dtype": "dsclip's towers keep their buffers as they are",
        "keep_in_fp32_modules": "dsclip's towers keep their buffers as they are; its scalars are fp32 always",
    },
    "zero_optimization": {
        "compute_grad_norm": "every step's metrics have the norm",
        "load_from_fp32_weights": "a run resumes from its fp32 weights, bit for bit",
        "elastic_checkpoint": f"{_GONE}; a run continues with any number of ranks (`--resume`)",
        "legacy_stage1": "the old code of stage 1 has not been tried with dsclip",
        "zenflow": "it delays a part of the updates, and dsclip's step is exact",
        "cpu_offload": 'this is the old name of `offload_optimizer`; write {"device": "cpu"} there',
        "cpu_offload_param": 'this is the old name of `offload_param`; write {"device": "cpu"} there',
        "cpu_offload_use_pin_memory": "this is the old name of `pin_memory` in `offload_param` and `offload_optimizer`",
        "stage3_gather_fp16_weights_on_model_save": "tools/convert_hf.py puts a checkpoint's weights together",
        "stage3_gather_16bit_weights_on_model_save": "tools/convert_hf.py puts a checkpoint's weights together",
        "stage3_module_granularity_threshold": "dsclip tells DeepSpeed itself what is gathered as a whole: a block",
        "gather_16bit_weights_on_model_save": "tools/convert_hf.py puts a checkpoint's weights together",
        "module_granularity_threshold": "dsclip tells DeepSpeed itself what is gathered as a whole: a block",
        "leaf_module": "dsclip tells DeepSpeed itself what is gathered as a whole: a block",
        "zero_quantized_weights": _EIGHT_BITS,
        "zero_quantized_nontrainable_weights": _EIGHT_BITS,
        "zero_quantized_gradients": _EIGHT_BITS,
        "mics_shard_size": _MICS,
        "mics_hierarchical_params_gather": _MICS,
        "zeropp_loco_param": f"LoCo: {_GONE}; {_EIGHT_BITS}",
        "save_muon_momentum_buffer_in_memory": "it belongs to Muon with NVMe, and dsclip has neither",
        **{
            name: f"write `stage3_{name}`, the name by which the plan knows it"
            for name in (
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
                "use_all_reduce_for_fetch_params",
                "allgather_sequential",
            )  # fmt: skip
        },
    },
    "zero_optimization.offload_param": dict.fromkeys(("nvme_path", "buffer_count", "buffer_size", "max_in_cpu"), NVME),
    "zero_optimization.offload_optimizer": dict.fromkeys(
        ("nvme_path", "buffer_count", "pipeline_read", "pipeline_write", "fast_init"), NVME
    )
    | dict.fromkeys(("ratio", "super_offload", "cpuadam_cores_perc"), _WHOLE),
}
