"""Reads the DeepSpeed JSON strictly and fills in its "auto" sizes from the recipe.

DeepSpeed 0.19.8 ignores unknown keys at the top level and in some sections, and reads keys that only its own data loader
or activation checkpointing would obey: all of these would silently do nothing, and are refused instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsclip.config.deepspeed_keys import CHOICES, NUMBER, NVME, OBEYED, REFUSED, STAGES, Kind
from dsclip.config.schema import BatchSection, Recipe
from dsclip.errors import UserError, did_you_mean

DsConfig = dict[str, Any]  # a DeepSpeed JSON, or a section of it

SIZES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
KINDS: dict[Kind, str] = {
    int: "a whole number",
    NUMBER: "a number",
    bool: "true or false",
    str: "a word",
    dict: "a section",
    list: "a list",
}
AUTO = (*SIZES, "zero_optimization.stage3_param_persistence_threshold")  # keys that may say "auto"
# The optimizer is torch's AdamW or one of ours; DeepSpeed calls any but its own untested, and compiles its own for an optimizer
# that is offloaded.
TORCH_OPTIMIZER = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
OFFLOADED = ("adamw", "adamw_bf16", "lion")  # optimizers whose step needs no other rank
# What DeepSpeed writes for these goes to its log at the level info, which a dsclip run otherwise leaves out.
LOGGED = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "steps_per_print", "comms_logger")


def packaged_ds_configs() -> dict[str, Path]:
    """The files that come with dsclip, by name: ds_configs/ of the repository, dsclip/ds_configs/ of an installed wheel."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package / "ds_configs", package.parent / "ds_configs") if f.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_ds_config(name_or_path: str | Path, recipe: Recipe, world_size: int) -> DsConfig:
    """The DeepSpeed configuration of a packaged name or a file, with every size resolved.

    Raises UserError for unknown keys, for settings dsclip can't obey, and for numbers that contradict the recipe.
    """
    path = packaged_ds_configs().get(str(name_or_path)) or Path(name_or_path)
    config = _read_json(path)
    _check_section(config, "", path)
    _check_precision_and_stage(config, path)
    _check_applies(config, path)
    _check_reduction(config, path, recipe)
    _check_offload(config, path, recipe)
    return config | _sizes(config, path, recipe, world_size) | _defaults(config)


def resolve_persistence(config: DsConfig, batch: BatchSection) -> DsConfig:
    """The configuration with an "auto" stage3_param_persistence_threshold resolved: gradients that are reduced once a step go
    with parameters that are gathered once a step; otherwise none stays on every rank, since a layer's travel in one gather.
    """
    zero = config["zero_optimization"]
    if zero.get("stage3_param_persistence_threshold") != "auto":
        return config
    keep = {"stage3_param_persistence_threshold": 0}
    if batch.coalesce_reduction:
        keep = {"stage3_param_persistence_threshold": 10**12, "stage3_model_persistence_threshold": 10**13}
    return config | {"zero_optimization": zero | keep}


def _read_json(path: Path) -> DsConfig:
    if not path.is_file():
        packaged = packaged_ds_configs()
        raise UserError(
            f"--ds_config {path}: neither a file nor one that comes with dsclip.{did_you_mean(path.stem, list(packaged))} "
            f"Those: {', '.join(packaged)}"
        )

    def unique(pairs: list[tuple[str, Any]]) -> DsConfig:
        keys = [k for k, _ in pairs]
        if twice := {k for k in keys if keys.count(k) > 1}:
            raise UserError(f"{path}: key `{sorted(twice)[0]}` stands there twice")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no JSON object")
    return config


def _check_section(section: DsConfig, name: str, path: Path) -> None:
    """Every key of a section and of those within it: known, obeyed, and of its kind."""
    obeyed, refused = OBEYED[name], REFUSED.get(name, {})
    for key, value in section.items():
        full = f"{name}.{key}".lstrip(".")
        if key in refused:
            raise UserError(f"{path}: remove `{full}`: {refused[key]}.")
        if key not in obeyed:
            ignored = "" if name else " DeepSpeed would ignore it silently."
            raise UserError(f"{path}: unknown key `{full}`.{_suggestion(key, name)}{ignored}")
        if value is None or (value == "auto" and full in AUTO):
            continue
        kind = obeyed[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = 'is "auto", and dsclip fills in its sizes alone' if value == "auto" else f"is {value!r}"
            raise UserError(f"{path}: `{full}` {found}; it must be {KINDS[kind]}.")
        if full in CHOICES and value not in CHOICES[full]:
            reason = f" {NVME[0].upper()}{NVME[1:]}." if value == "nvme" else ""
            raise UserError(f"{path}: `{full}` is {value!r}; choose from {', '.join(CHOICES[full])}.{reason}")
        if isinstance(value, dict):
            _check_section(value, full, path)


def _suggestion(key: str, section: str) -> str:
    """The key that was meant: in this section, or where it belongs."""
    if close := did_you_mean(key, [*OBEYED[section], *REFUSED.get(section, {})]):
        return close
    homes = [name for name, keys in OBEYED.items() if key in keys and name not in ("fp16", section)]
    if not homes:
        return ""
    return f" It belongs to `{homes[0]}`." if homes[0] else " It belongs to the top level."


def _check_precision_and_stage(config: DsConfig, path: Path) -> None:
    fp16 = config.get("fp16")
    if isinstance(fp16, dict) and fp16.get("enabled"):
        raise UserError(
            f"{path}: fp16 is not supported: large CLIP runs diverged with it and bf16 fixed them. Set bf16.enabled to true."
        )
    bf16 = config.get("bf16")
    if isinstance(bf16, dict) and bf16.get("check_grad_overflow") is False:
        raise UserError(
            f"{path}: remove bf16.check_grad_overflow: without it ZeRO-2 would put gradients that are not finite into the weights."
        )
    zero = config.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stage not in (1, 2, 3):
        raise UserError(
            f"{path}: zero_optimization.stage is {stage!r}; choose 1 (shards the optimizer), 2 (also the gradients) or "
            "3 (also the parameters)."
        )


def _check_applies(config: DsConfig, path: Path) -> None:
    """Refuses what DeepSpeed reads without effect at this stage, or without something beside it."""
    zero = config["zero_optimization"]
    stage = zero["stage"]
    for key, value in zero.items():
        stages = (3,) if key.startswith("stage3_") else STAGES.get(key, (1, 2, 3))
        if stage not in stages and value is not None:
            named = " and ".join(map(str, stages))
            raise UserError(
                f"{path}: remove `zero_optimization.{key}`: it works at stage {named}, and the stage is {stage}."
            )
    if zero.get("memory_efficient_linear"):
        raise UserError(
            f"{path}: remove `zero_optimization.memory_efficient_linear`: DeepSpeed's linear layer would compute again products that "
            "checkpointing leaves out, and a layer's weights are gathered for it as a whole anyway."
        )
    if stage != 1 and (config.get("bf16") or {}).get("immediate_grad_update"):
        raise UserError(f"{path}: remove `bf16.immediate_grad_update`: it works at stage 1, and the stage is {stage}.")
    for key, value in TORCH_OPTIMIZER.items():
        if config.get(key, value) is not value:
            raise UserError(
                f"{path}: remove `{key}`: the optimizer is torch's AdamW or dsclip's own, offloaded or not."
            )
    comms = config.get("comms_logger") or {}
    if comms.get("enabled") and not comms.get("verbose"):
        raise UserError(
            f"{path}: `comms_logger` shows nothing without `verbose: true`: dsclip never asks DeepSpeed for its summary."
        )


def _check_reduction(config: DsConfig, path: Path, recipe: Recipe) -> None:
    stage = config["zero_optimization"]["stage"]
    if recipe.batch.coalesce_reduction and stage == 1:
        raise UserError(
            f"{path}: batch.coalesce_reduction needs ZeRO stage 2 or 3, and the stage is 1, which reduces once a step anyway."
        )


def _check_offload(config: DsConfig, path: Path, recipe: Recipe) -> None:
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and recipe.optim.name not in OFFLOADED:
        raise UserError(
            f"{path}: remove `zero_optimization.offload_optimizer`, or choose optim.name {', '.join(OFFLOADED[:-1])} or {OFFLOADED[-1]}: "
            f"{recipe.optim.name} looks at whole tensors, whose parts ranks exchange on their devices."
        )


def _sizes(config: DsConfig, path: Path, recipe: Recipe, world_size: int) -> DsConfig:
    total = recipe.batch.global_batch_size
    if total % world_size:
        lower = total // world_size * world_size
        raise UserError(
            f"batch.global_batch_size is {total}, which {world_size} ranks can't share equally; "
            f"use {lower or world_size} or {lower + world_size}."
        )
    expected = {
        "train_batch_size": (total, "batch.global_batch_size"),
        "train_micro_batch_size_per_gpu": (total // world_size, f"batch.global_batch_size / {world_size} ranks"),
        # dsclip accumulates itself, on the exact loss of the global batch.
        "gradient_accumulation_steps": (
            1,
            "batch.micro_batch_size, which splits the batch exactly; it leaves this at",
        ),
    }
    for key, (value, origin) in expected.items():
        given = config.get(key, "auto")
        if given not in ("auto", value):
            raise UserError(
                f'{path}: `{key}` is {given!r}, but the recipe gives {value} ({origin} {value}). Write "auto", or change the recipe.'
            )
    return {key: value for key, (value, _) in expected.items()}


def _defaults(config: DsConfig) -> DsConfig:
    """What a run needs whether or not the file says it."""
    never = 10**9  # also in the resolved file that a run writes, which may be used again
    logged = any(config.get(key) not in (None, False, {}, 0, never) for key in LOGGED)
    return {
        **TORCH_OPTIMIZER,
        "steps_per_print": config.get("steps_per_print") or never,
        # DeepSpeed's default of 1.0 would clip unasked.
        "gradient_clipping": config.get("gradient_clipping", 0.0),
        **({"log_level": "info"} if logged and not config.get("log_level") else {}),
    }
