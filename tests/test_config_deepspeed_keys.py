"""No key of the DeepSpeed JSON is accepted and without effect: typos and what dsclip can't obey are refused by name."""

import json

import pytest

from dsclip.config import load_ds_config, load_recipe
from dsclip.config.deepspeed_keys import CHOICES, OBEYED, REFUSED, STAGES
from dsclip.errors import UserError


def load(tmp_path, *, stage=3, **changes):
    """The resolved configuration of a small JSON; `zero_optimization` adds to the stage."""
    path = tmp_path / "ds.json"
    zero = {"stage": stage} | changes.pop("zero_optimization", {})
    path.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero} | changes))
    return load_ds_config(path, load_recipe("demo"), world_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "set `batch.checkpointing`"),
        ({"curriculum_learning": {"enabled": True}}, "dsclip reads data itself"),
        ({"dataloader_drop_last": True}, "always whole"),
        ({"data_efficiency": {}}, "dsclip reads data itself"),
        ({"compile": {"deepcompile": True}}, "`train.compile`"),
        ({"flops_profiler": {"enabled": True}}, "tools/plan.py"),
        ({"wandb": {"enabled": True}}, "metrics.jsonl"),
        ({"checkpoint": {"use_node_local_storage": True}}, "dsclip writes checkpoints itself"),
        ({"elasticity": {"enabled": True}}, "DeepSpeed 0.19.8 has it no more"),
        ({"nebula": {}}, "DeepSpeed 0.19.8 has it no more"),
        ({"amp": {}}, "use bf16"),
        ({"zero_optimization": {"mics_shard_size": 8}}, "remove `zero_optimization.mics_shard_size`: MiCS"),
        ({"zero_optimization": {"zeropp_loco_param": {}}}, "LoCo"),
        ({"zero_optimization": {"cpu_offload": True}}, "the old name of `offload_optimizer`"),
        ({"zero_optimization": {"max_live_parameters": 5}}, "write `stage3_max_live_parameters`"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "choose from none, cpu. Dsclip offloads to host"),
        ({"zero_optimization": {"memory_efficient_linear": True}}, "remove `zero_optimization.memory_efficient_linear`"),
        ({"zero_optimization": {"overlap_com": True}}, "`zero_optimization.overlap_com`. Did you mean `overlap_comm`?"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "Did you mean `device`?"),
        ({"zero_optimization": {"gradient_clipping": 1.0}}, "It belongs to the top level."),
        ({"data_types": {"grad_accum_type": "fp32"}}, "Did you mean `grad_accum_dtype`?"),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "is 'fp8'; choose from fp32, bf16"),
        ({"bf16": {"enable": True}}, "Did you mean `enabled`?"),
        ({"timers": {"throughput": {"synchronised": False}}}, "Did you mean `synchronized`?"),
        ({"comms_logger": {"enabled": True}}, "shows nothing without `verbose: true`"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, "`zero_optimization.overlap_comm` is 'yes'; it must be true or false"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "dsclip fills in its sizes alone; it must be a number"),
        ({"zero_optimization": {"reduce_bucket_size": True}}, "is True; it must be a number"),
        ({"stage": 2, "zero_optimization": {"stage3_max_live_parameters": 5}}, "works at stage 3, and the stage is 2"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "works at stage 1 and 2, and the stage is 3"),
        ({"bf16": {"enabled": True, "immediate_grad_update": True}}, "works at stage 1, and the stage is 3"),
        ({"zero_allow_untested_optimizer": False}, "remove `zero_allow_untested_optimizer`: the optimizer is torch's AdamW or dsclip's own"),
        ({"zero_force_ds_cpu_optimizer": True}, "remove `zero_force_ds_cpu_optimizer`: the optimizer is torch's AdamW or dsclip's own"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused_with_what_to_use_instead(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        load(tmp_path, **changes)
    assert message in str(error.value) and str(tmp_path / "ds.json") in str(error.value)


def test_what_deepspeed_logs_is_shown_when_it_is_asked_for(tmp_path):
    assert "log_level" not in load(tmp_path)
    assert load(tmp_path, wall_clock_breakdown=True)["log_level"] == "info"
    assert load(tmp_path, steps_per_print=10)["log_level"] == "info"
    assert load(tmp_path, steps_per_print=10, log_level="error")["log_level"] == "error"
    again = tmp_path / "again.json"
    again.write_text(json.dumps(load(tmp_path)))
    assert "log_level" not in load_ds_config(again, load_recipe("demo"), 2), "a run's resolved file says the same"


def test_every_field_of_deepspeeds_own_models_is_obeyed_or_refused():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    models = {
        "bf16": precision_config.DeepSpeedBF16Config, "fp16": precision_config.DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig, "timers.throughput": DeepSpeedThroughputTimerConfig,
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_param": offload_config.DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": offload_config.DeepSpeedZeroOffloadOptimizerConfig,
    }  # fmt: skip
    for section, model in models.items():
        fields = {name for f, info in model.model_fields.items() for name in (f, info.alias) if name}
        removed = set(config._REMOVED_ZERO_CONFIG_KEYS) if section == "zero_optimization" else set()
        assert set(OBEYED[section]) | set(REFUSED.get(section, {})) == fields | removed, section
    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED[""])


def test_the_lists_agree_with_each_other():
    for section, keys in REFUSED.items():
        assert not set(keys) & set(OBEYED[section])
    assert set(STAGES) <= set(OBEYED["zero_optimization"])
    for full in CHOICES:
        section, _, key = full.rpartition(".")
        assert OBEYED[section][key] is str
    for section, keys in OBEYED.items():
        for key, kind in keys.items():
            assert (f"{section}.{key}".lstrip(".") in OBEYED) == (kind is dict)
