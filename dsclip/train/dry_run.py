"""What `--dry-run` prints: the resolved recipe, the DeepSpeed configuration, sizes, and one real batch."""

from __future__ import annotations

import json

import torch

from dsclip.checkpoint import read_manifest
from dsclip.config import dump_recipe
from dsclip.convert.init import fitted_weights, scale_notes
from dsclip.convert.source import open_source
from dsclip.distributed import Collectives, launched_ranks
from dsclip.model.device import check_device
from dsclip.plan import Estimate, plan_batch
from dsclip.plan.advice import describe_choice
from dsclip.plan.machine import this_machine
from dsclip.plan.workload import Workload
from dsclip.train.data_warnings import data_warnings
from dsclip.train.inputs import RunInputs, make_loader
from dsclip.train.resume import Resumed


def describe_run(inputs: RunInputs) -> str:
    """The text, after everything that a run would read was read once."""
    notes = list[str]()
    if inputs.init:
        source = open_source(inputs.init)
        fitted_weights(source, inputs.model, inputs.recipe.model.stretch)
        notes = source.notes(inputs.model) + scale_notes(source, inputs.recipe.loss.max_logit_scale)
    check_device(inputs.model, torch.device("cuda" if torch.cuda.is_available() else "cpu"), inputs.ds_config)
    world_size = launched_ranks()[1]
    manifest = read_manifest(inputs.resume) if inputs.resume else None
    loader = make_loader(inputs, Collectives(0, world_size), Resumed(manifest, inputs.recipe).data_state)
    batch = next(iter(loader))
    recipe, evaluation = inputs.recipe, inputs.evaluation
    local_batch = recipe.batch.global_batch_size // world_size
    trained = inputs.trained
    work = Workload.of(recipe, trained)
    _, estimate = plan_batch(inputs.model, recipe.batch, inputs.ds_config, world_size, this_machine(), work)
    return "\n".join([
        "# recipe", dump_recipe(recipe), "# DeepSpeed", json.dumps(inputs.ds_config, indent=2),
        "# plan",
        f"run folder          {inputs.run_dir}" + (f", continued from {inputs.resume}" if inputs.resume else ""),
        f"model               {recipe.model.name}, {(trained.of - trained.beside) / 1e6:.2f} M parameters, {inputs.tokenizer.vocab_size} token vocabulary",
        f"trained             {trained}",
        f"global batch        {recipe.batch.global_batch_size} = {world_size} ranks x {local_batch} samples",
        f"a rank's step       {describe_estimate(estimate)}",
        f"data                {recipe.data.train_shards}: first caption {batch.report.captions[0]!r}",
        *(f"evaluation          {task} on {evaluation.names[task]}, {len(dataset)} samples" for task, dataset in evaluation.sets.items()),
        *data_warnings(recipe, loader.set_samples, loader.damaged), *notes,
        "The settings fit together. Leave out --dry-run to train.",
    ])  # fmt: skip


def describe_estimate(estimate: Estimate) -> str:
    """A line on how the batch goes through the towers and what it will take."""
    text = f"{describe_choice(estimate)}; at most {estimate.peak_mb / 1e3:.1f} GB a rank by the plan"
    return text if estimate.fits else f"{text}, more than there is: `python tools/plan.py` says what to change"
