"""One training run from the command line to its summary: the phases, in order."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dsclip.checkpoint import CheckpointStore, load_verified, read_checkpoint
from dsclip.checkpoint.store import ROOM
from dsclip.command_line import say
from dsclip.config import dump_recipe
from dsclip.config.train_section import TrainSection, saves_in_background
from dsclip.convert import export_hf
from dsclip.convert.hf import hf_class, is_convertible
from dsclip.convert.init import load_init_once
from dsclip.distributed import Collectives, check_one_job, launched_ranks
from dsclip.errors import RunFailed, RunStopped, UserError
from dsclip.plan import plan_recipe
from dsclip.plan.estimate import Estimate
from dsclip.saving import Background, available
from dsclip.train.data_warnings import data_warnings
from dsclip.train.dry_run import describe_estimate, describe_run
from dsclip.train.guard import Guard, RollBack, without_skipped
from dsclip.train.inputs import RunInputs, make_loader, read_inputs
from dsclip.train.loop import Outcome, train
from dsclip.train.metrics_log import read_trouble
from dsclip.train.records import Summary, Totals
from dsclip.train.resume import Resumed, keep_planned_sizes
from dsclip.train.run_folder import RunFolder
from dsclip.train.saving import Saving
from dsclip.train.summary import console_summary, write_summary
from dsclip.train.teacher import Teacher
from dsclip.train.watch import Watch

if TYPE_CHECKING:
    from dsclip.engine.contrastive import ContrastiveEngine


def run(arguments: argparse.Namespace) -> None:
    """Checks, builds, trains, evaluates, exports, and says what to do next."""
    inputs = read_inputs(arguments)
    if arguments.dry_run:
        if launched_ranks()[0] == 0:
            print(describe_run(inputs))
        return

    # Here and below: importing the engine takes DeepSpeed's seconds, which wrong inputs and dry runs are spared.
    from dsclip.engine.build import init_distributed

    init_distributed()
    check_one_job(Collectives.current(), f"{dump_recipe(inputs.recipe)}\n{json.dumps(inputs.ds_config, indent=1)}")
    folder = RunFolder(inputs.run_dir, arguments.resume, Collectives.current())
    try:
        train_in(folder, replace(inputs, resume=folder.resume, init=None if folder.resume else inputs.init))
    finally:
        folder.release()


def train_in(folder: RunFolder, inputs: RunInputs) -> None:
    """The run itself, in a folder that it holds. Collective."""
    recipe = inputs.recipe
    manifest = folder.manifest
    # Other numbers of ranks have other parts of the batch, and memory.
    if manifest and manifest["world_size"] == launched_ranks()[1]:
        was = manifest["recipe"].get("batch", {})
        recipe = replace(recipe, batch=keep_planned_sizes(recipe.batch, was, launched_ranks()[1]))
    recipe, estimate = plan_recipe(recipe, inputs.ds_config, inputs.model, Collectives.current(), inputs.trained)
    inputs = replace(inputs, recipe=recipe)

    engine = build_engine(inputs)
    inputs = replace(inputs, ds_config=engine.ds_config)
    teacher = None
    if inputs.taught is not None and inputs.taught.beside is not None:
        teacher = inputs.taught.beside.load(engine.device, recipe.batch.chunk_size or recipe.batch.micro_batch_size)
    went_back: RollBack | None = None
    while True:
        try:
            watch, outcome = train_on(folder, inputs, engine, estimate, went_back, teacher)
        except RollBack as back:
            went_back = back.with_traceback(None)  # whose frames hold the loader
        else:
            break
        gc.collect()  # the loader's workers and its memory
        folder.go_back(went_back.before, went_back.batches)
        if engine.group.rank == 0:
            went_back.write(inputs.run_dir)
        inputs = replace(inputs, resume=folder.resume, init=None)
    watch.check_applied()
    finish(inputs, engine, watch, outcome, estimate.peak_mb, folder.lineage.skipped)


def train_on(
    folder: RunFolder,
    inputs: RunInputs,
    engine: ContrastiveEngine,
    estimate: Estimate,
    went_back: RollBack | None,
    teacher: Teacher | None,
) -> tuple[Watch, Outcome]:
    """From the checkpoint that the folder continues, or from the start. Raises RollBack when the run goes back. Collective.

    went_back: why it did before, None in a launch's first call: what was loaded before then goes on in the same engine.
    """
    recipe, manifest = inputs.recipe, folder.manifest
    if inputs.resume and manifest:
        load_verified(engine, inputs.resume, manifest, world_size=engine.group.world_size)
    resumed = Resumed(manifest, recipe)
    loader = make_loader(inputs, engine.group, resumed.data_state)

    folder.claim(recipe, inputs.ds_config)
    store = CheckpointStore(
        inputs.run_dir, recipe.train.keep_checkpoints, inputs.tokenizer, folder.lineage, folder.lock,
        background(recipe.train, engine),
    )  # fmt: skip
    watch = Watch(inputs, engine, resumed, went_back.tally if went_back else None)
    if went_back is not None:
        went_back.tell(watch, engine.step, inputs.run_dir, len(folder.lineage.skipped), recipe.train.max_rollbacks)
    of_a_launch = [
        *([str(inputs.trained)] if inputs.trained.parameters < inputs.trained.of else []),
        *resumed.describe(inputs.resume, engine.sharding),
        describe_estimate(estimate),
        *data_warnings(recipe, loader.set_samples, loader.damaged),
    ]
    for line in (*folder.messages, *(of_a_launch if went_back is None else [])):
        watch.message(line)

    saving = Saving(recipe, engine, store, watch)
    guard = Guard(recipe.train, engine.group, folder, watch, resumed.guard, saving.wait)
    batches = without_skipped(iter(loader), folder.lineage)
    data_state = resumed.data_state_of(engine.group.rank, engine.group.world_size)
    try:
        outcome = train(recipe, engine, batches, inputs.evaluation, saving, watch, guard, data_state, teacher)
    except RunStopped:
        watch.close()
        engine.close()
        raise
    except RollBack as back:
        watch.close()
        back.tally = watch.tally
        raise
    except UserError:
        watch.close()  # which says what its log has lost
        raise
    finally:
        store.close()
        watch.flush()
    return watch, outcome


def build_engine(inputs: RunInputs) -> ContrastiveEngine:
    """The engine, with the weights of `model.init`, which rank 0 reads. Collective."""
    from dsclip.engine.contrastive import ContrastiveEngine

    weights = scale = bias = None
    if inputs.init:
        group = Collectives.current()
        initial = load_init_once(
            inputs.init, inputs.model, group, inputs.recipe.model.stretch, inputs.recipe.loss.max_logit_scale
        )
        weights, scale, bias = initial.weights, initial.scale, initial.bias
        for note in initial.notes if group.rank == 0 else ():
            say(note)
    return ContrastiveEngine(
        inputs.recipe, inputs.ds_config, inputs.model, state_dict=weights, init_scale=scale, init_bias=bias
    )


def background(settings: TrainSection, engine: ContrastiveEngine) -> Background | None:
    """What writes the checkpoints on the way, if the recipe wants it and there will be any. Raises UserError where it can't be had."""
    never = settings.save_every is None and settings.save_minutes is None
    if never or not saves_in_background(settings.save_in_background, engine.device.type):
        return None
    if not available():
        raise UserError("train.save_in_background=on needs Linux, for memory that processes share; set it to off")
    return Background(round(engine.bytes_to_save() * ROOM / engine.group.world_size), engine.device)


def finish(
    inputs: RunInputs, engine: ContrastiveEngine, watch: Watch, outcome: Outcome, planned_mb: float,
    left_out: Sequence[tuple[int, int]],
) -> None:  # fmt: skip
    """The HuggingFace export and the summary, by rank 0; the others wait. Raises RunFailed when the last evaluation failed.

    left_out: the first and last batches that the run left out, each time that it went back.
    """
    group, totals = engine.group, watch.totals()
    engine.close()
    if group.rank == 0:
        if inputs.recipe.train.export_hf:
            checkpoint = read_checkpoint(outcome.checkpoint)
            no_bias = checkpoint.logit_bias is not None and hf_class(checkpoint.config) == "CLIPModel"
            heads = f", without the heads {', '.join(checkpoint.heads)}, which are for training alone" * bool(
                checkpoint.heads
            )
            without = ", without the loss's bias, which CLIPModel has no place for" * no_bias
            watch.message(f"converting {outcome.checkpoint} to a HuggingFace folder{without}{heads}")
            export_hf(
                checkpoint,
                inputs.run_dir / "hf",
                metrics=outcome.evaluation,
                data=inputs.evaluation.names,
                overwrite=True,
            )
        watch.close()
        summary = summarise(inputs, outcome, totals, planned_mb, left_out)
        write_summary(inputs.run_dir, summary)
        print(console_summary(summary, inputs.run_dir))
    group.barrier()
    if outcome.evaluation_errors and outcome.evaluation_errors[-1]["step"] == outcome.step:
        raise RunFailed(
            f"the run is complete and saved in {outcome.checkpoint}, but its last evaluation failed: "
            f"{outcome.evaluation_errors[-1]['error']}. Correct that and continue with --resume auto, which evaluates again."
        )


def summarise(
    inputs: RunInputs, outcome: Outcome, totals: Totals, planned_mb: float, left_out: Sequence[tuple[int, int]]
) -> Summary:
    """The content of `summary.json`. planned_mb: the memory of a rank by the plan, in 10⁶ bytes; left_out: as for `finish`."""
    recipe = inputs.recipe
    spikes, rollbacks = read_trouble(inputs.run_dir / "metrics.jsonl")
    return {
        "model": recipe.model.name,
        "train_shards": recipe.data.train_shards,
        "global_batch_size": recipe.batch.global_batch_size,
        "steps": outcome.step,
        "samples": outcome.step * recipe.batch.global_batch_size,
        "loss": outcome.loss,
        "eval": outcome.evaluation,
        "evaluation_errors": outcome.evaluation_errors,
        "eval_data": {task: getattr(recipe.eval, f"{task}_shards") for task in outcome.evaluation},
        "eval_names": inputs.evaluation.names,
        "checkpoint": str(outcome.checkpoint),
        "hf_export": str(inputs.run_dir / "hf") if recipe.train.export_hf else None,
        "convertible": is_convertible(inputs.model),
        "planned_memory_gb": planned_mb / 1e3,
        "spikes": spikes,
        "rollbacks": rollbacks,
        "left_out_batches": [list(pair) for pair in left_out],
        **totals,
    }
