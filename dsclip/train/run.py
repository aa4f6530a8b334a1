"""One training run from the command line to its summary: the phases, in order."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsclip.checkpoint import CheckpointStore, load_checkpoint, read_manifest
from dsclip.config import Recipe, dump_recipe, load_ds_config, load_recipe
from dsclip.data import build_loader, load_tokenizer, resolve_shards
from dsclip.data.loader import data_sets
from dsclip.data.order.exact import check_split, default_streams
from dsclip.data.sources.storage import Storage
from dsclip.distributed import Collectives, launched_ranks
from dsclip.errors import RunFailed, UserError
from dsclip.losses import check_options, find_loss
from dsclip.model import ClipConfig, resolve_preset
from dsclip.plan import Estimate, plan_batch, plan_recipe
from dsclip.plan.advice import describe_choice
from dsclip.plan.machine import this_machine
from dsclip.train.data_warnings import data_warnings
from dsclip.train.evaluation import Evaluation
from dsclip.train.loop import train
from dsclip.train.resume import Resumed, check_length, keep_planned_sizes
from dsclip.train.run_folder import RunFolder, find_resume
from dsclip.train.summary import console_summary, write_summary
from dsclip.train.watch import Watch


@dataclass(frozen=True)
class Plan:
    """Everything that was checked before the first collective."""

    recipe: Recipe
    ds_config: dict
    model: ClipConfig
    tokenizer: object
    run_dir: Path
    resume: Path | None
    init: str | None  # the weights to start from
    evaluation: Evaluation  # its sets open and checked


def run(arguments: argparse.Namespace) -> None:
    """Checks, builds, trains, evaluates, exports, and says what to do next."""
    plan = make_plan(arguments)
    rank = launched_ranks()[0]
    if arguments.dry_run:
        if rank == 0:
            print(describe(plan))
        return

    from dsclip.engine.build import init_distributed

    init_distributed()
    folder = RunFolder(plan.run_dir, arguments.resume, Collectives.current())
    try:
        init = None if folder.resume else plan.recipe.model.init
        train_in(folder, replace(plan, resume=folder.resume, init=init))
    finally:
        folder.release()


def train_in(folder: RunFolder, plan: Plan) -> None:
    """The run itself, in a folder that it holds."""
    if plan.resume:
        was = read_manifest(plan.resume)["recipe"].get("batch", {})
        batch = keep_planned_sizes(plan.recipe.batch, was, launched_ranks()[1])
        plan = replace(plan, recipe=replace(plan.recipe, batch=batch))
    recipe, estimate = plan_recipe(plan.recipe, plan.ds_config, plan.model, Collectives.current())
    engine = build_engine(replace(plan, recipe=recipe))
    group, plan = engine.group, replace(plan, recipe=recipe, ds_config=engine.ds_config)
    resumed = Resumed.nothing()
    if plan.resume:
        resumed = Resumed(load_checkpoint(engine, plan.resume, world_size=group.world_size), plan.recipe)
    loader = make_loader(plan, group, resumed.data_state)
    folder.claim(plan.recipe, plan.ds_config, resumed.manifest)
    store = CheckpointStore(
        plan.run_dir, plan.recipe.train.keep_checkpoints, plan.tokenizer, folder.lineage, folder.lock
    )
    watch = Watch(plan, engine, resumed)
    warnings = data_warnings(plan.recipe, loader.set_samples, loader.damaged)
    for line in (*folder.messages, *resumed.describe(plan.resume), describe_plan(estimate), *warnings):
        watch.message(line)
    outcome = train(plan.recipe, engine, loader, plan.evaluation, store, watch, resumed.data_state_of(group.rank))
    watch.check_applied()
    finish(plan, engine, watch, outcome, estimate.peak_mb)


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Reads and checks all input on every rank alike; raises UserError before anything is built or written."""
    recipe = load_recipe(arguments.config, arguments.overrides)
    check_options(find_loss(recipe.loss.name, recipe.loss.plugin), recipe.loss)
    world_size = launched_ranks()[1]
    ds_config = load_ds_config(arguments.ds_config, recipe, world_size)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    batch = recipe.batch.global_batch_size
    check_split(recipe.data.streams or default_streams(batch), batch, world_size, recipe.data.workers)
    storage = Storage(tuple(recipe.data.trusted_hosts), recipe.data.retries)
    for key, shards in named_shards(recipe):
        try:
            resolve_shards(shards, storage)
        except UserError as error:
            raise UserError(f"`{key}`: {error}") from error
    run_dir = Path(recipe.train.output) / recipe.train.name
    resume = find_resume(arguments.resume, run_dir)
    if resume:
        check_length(resume, recipe.train.steps)
    overrides = {k: v for k, v in asdict(recipe.model).items() if k not in ("preset", "init")}
    vocabulary = dict(vocab_size=tokenizer.vocab_size, eot_token_id=tokenizer.eot_token_id)
    model = resolve_preset(recipe.model.preset, **overrides, **vocabulary)
    init = None if resume else recipe.model.init
    evaluation = Evaluation(recipe, model, tokenizer)
    return Plan(recipe, ds_config, model, tokenizer, run_dir, resume, init, evaluation)


def build_engine(plan: Plan):
    """The engine, with the weights of `model.init`, which rank 0 reads. Collective."""
    from dsclip.convert.init import load_init_once
    from dsclip.engine.contrastive import ContrastiveEngine

    weights = scale = None
    if plan.init:
        weights, scale = load_init_once(plan.init, plan.model, Collectives.current())
    return ContrastiveEngine(plan.recipe, plan.ds_config, plan.model, state_dict=weights, init_scale=scale)


def named_shards(recipe: Recipe) -> list[tuple[str, str | list[str]]]:
    """(key of the recipe, shards) of the training data and of every evaluation that is on."""
    training = [("data.train_shards", shards) for shards in data_sets(recipe.data)]
    tasks = ("zeroshot_shards", "retrieval_shards", "hard_negatives_shards")
    return training + [(f"eval.{t}", getattr(recipe.eval, t)) for t in tasks if getattr(recipe.eval, t)]


def make_loader(plan: Plan, group: Collectives, state: dict | None):
    """This rank's endless loader, at the position of `state`."""
    recipe = plan.recipe
    return build_loader(
        recipe.data,
        tokenizer=plan.tokenizer,
        image_size=plan.model.image_size,
        context_length=plan.model.context_length,
        global_batch_size=recipe.batch.global_batch_size,
        seed=recipe.train.seed,
        rank=group.rank,
        world_size=group.world_size,
        hard_negatives=recipe.loss.hard_negatives != "none",
        state=state,
    )


def describe_plan(found: Estimate) -> str:
    """A line on how the batch goes through the towers and what it will take."""
    text = f"{describe_choice(found)}; at most {found.peak_mb / 1e3:.1f} GB a rank by the plan"
    return text if found.fits else f"{text}, more than there is: `python tools/plan.py` says what to change"


def describe(plan: Plan) -> str:
    """What a dry run prints: the resolved recipe, the DeepSpeed configuration, sizes, and one real batch."""
    import torch

    from dsclip.model import Clip

    if plan.init:
        from dsclip.convert.init import load_init

        load_init(plan.init, plan.model)
    with torch.device("meta"):
        parameters = Clip(plan.model).parameter_count()
    world_size = launched_ranks()[1]
    loader = make_loader(plan, Collectives(0, world_size), None)
    batch = next(iter(loader))
    local = plan.recipe.batch.global_batch_size // world_size
    _, found = plan_batch(
        plan.model, plan.recipe.batch, plan.ds_config, world_size, this_machine(), loss=plan.recipe.loss
    )
    return "\n".join([
        "# recipe", dump_recipe(plan.recipe), "# DeepSpeed", json.dumps(plan.ds_config, indent=2),
        "# plan",
        f"run folder          {plan.run_dir}" + (f", continued from {plan.resume}" if plan.resume else ""),
        f"model               {plan.recipe.model.preset}, {parameters / 1e6:.2f} M parameters, {plan.tokenizer.vocab_size} token vocabulary",
        f"global batch        {plan.recipe.batch.global_batch_size} = {world_size} ranks x {local} samples",
        f"a rank's step       {describe_plan(found)}",
        f"data                {plan.recipe.data.train_shards}: first caption {batch.report.captions[0]!r}",
        *(f"evaluation          {task} on {name}, {len(plan.evaluation.sets[task])} samples" for task, name in plan.evaluation.names.items()),
        *data_warnings(plan.recipe, loader.set_samples, loader.damaged),
        "The settings fit together. Leave out --dry-run to train.",
    ])  # fmt: skip


def finish(plan: Plan, engine, watch: Watch, outcome, planned_mb: float) -> None:
    """The HuggingFace export and the summary, by rank 0; the others wait. Raises RunFailed when the last evaluation failed."""
    from dsclip.checkpoint import read_checkpoint
    from dsclip.convert import export_hf

    group, totals = engine.group, watch.totals()
    engine.close()
    if group.rank == 0:
        hf_export = None
        if plan.recipe.train.export_hf:
            hf_export = plan.run_dir / "hf"
            watch.message(f"converting {outcome.checkpoint} to a HuggingFace folder")
            results = dict(metrics=outcome.evaluation, data=plan.evaluation.names)
            export_hf(read_checkpoint(outcome.checkpoint), hf_export, **results, overwrite=True)
        summary = {
            "model": plan.recipe.model.preset,
            "train_shards": plan.recipe.data.train_shards,
            "global_batch_size": plan.recipe.batch.global_batch_size,
            "steps": outcome.step,
            "samples": outcome.step * plan.recipe.batch.global_batch_size,
            "loss": outcome.loss,
            "eval": outcome.evaluation,
            "evaluation_errors": outcome.evaluation_errors,
            "eval_data": {task: getattr(plan.recipe.eval, f"{task}_shards") for task in outcome.evaluation},
            "eval_names": plan.evaluation.names,
            "checkpoint": str(outcome.checkpoint),
            "hf_export": None if hf_export is None else str(hf_export),
            "planned_memory_gb": planned_mb / 1e3,
            **totals,
        }
        watch.close()
        write_summary(plan.run_dir, summary)
        print(console_summary(summary, plan.run_dir))
    group.barrier()
    if outcome.evaluation_errors and outcome.evaluation_errors[-1]["step"] == outcome.step:
        raise RunFailed(
            f"the run is complete and saved in {outcome.checkpoint}, but its last evaluation failed: "
            f"{outcome.evaluation_errors[-1]['error']}. Correct that and continue with --resume auto, which evaluates again."
        )
