"""Options of `accelerate launch` that would have no effect: DeepSpeed's JSON and the recipe say the same things here."""

from __future__ import annotations

from collections.abc import Mapping

from dsclip.errors import UserError

# The variable that accelerate sets for an option, the values that change nothing here, the option, what to do.
_OPTIONS = (
    ("ACCELERATE_USE_DEEPSPEED", ("", "false"), "--use_deepspeed", "give the JSON to the script: --ds_config JSON"),
    ("ACCELERATE_USE_FSDP", ("", "false"), "--use_fsdp", "--ds_config zero3_bf16 shards the same things"),
    ("ACCELERATE_USE_MEGATRON_LM", ("", "false"), "--use_megatron_lm", "--ds_config zero3_bf16 shards the model"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", ("", "false"), "--use_parallelism_config", "--ds_config zero3_bf16 shards the model"),
    ("ACCELERATE_MIXED_PRECISION", ("", "no", "bf16"), "--mixed_precision", "all runs are bf16"),
    ("ACCELERATE_DYNAMO_BACKEND", ("", "no"), "--dynamo_backend", "nothing is compiled"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("", "1"), "--gradient_accumulation_steps", "set batch.micro_batch_size"),
)  # fmt: skip


def refuse_without_effect(environment: Mapping[str, str], on_gpu: bool) -> None:
    """Raises UserError for what `accelerate launch`, or the user's accelerate configuration, asks for in vain.

    environment: of this process. on_gpu: whether the run will be on one.
    """
    for variable, harmless, option, instead in _OPTIONS:
        value = environment.get(variable, "")
        if value.lower() not in harmless:
            raise UserError(
                f"`accelerate launch` was told {option} ({variable}={value}), which has no effect here: {instead}. Leave it "
                "out, also of accelerate's own configuration file (--config_file names another)."
            )
    if "MASTER_PORT" in environment and "WORLD_SIZE" not in environment and "ACCELERATE_USE_CPU" in environment:
        raise UserError(
            "`accelerate launch --cpu` starts a single process, whatever --num_processes says; use `accelerate launch "
            "--multi_gpu --num_processes N`, which starts N of them on a CPU too"
        )
    if on_gpu and environment.get("ACCELERATE_USE_CPU", "").lower() == "true":
        raise UserError(
            "`accelerate launch` was told --cpu on a machine with GPUs; set the environment variables DS_ACCELERATOR=cpu and "
            "CUDA_VISIBLE_DEVICES= (empty) as well"
        )
