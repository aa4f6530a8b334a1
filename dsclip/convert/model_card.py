"""The README.md of a converted model: what it is, how it was trained and measured, and what to be careful about."""

from __future__ import annotations

import json

from dsclip.checkpoint import Checkpoint

OPTIMIZERS = {
    "adamw": "AdamW", "adamw_bf16": "AdamW with moments in bf16", "stable_adamw": "StableAdamW", "lion": "Lion", "lamb": "LAMB", "muon": "Muon",
}  # fmt: skip
Metrics = dict[str, dict[str, float | list[float]]]  # {task: {metric: value, metric_ci95: [lower, upper]}}


def results_of_run(checkpoint: Checkpoint) -> tuple[Metrics, dict[str, str]]:
    """(metrics {task: {metric: value}}, data {task: its name}) that the checkpoint's run measured at its step; or nothing.

    A run measures its weights as they are, so of their average nothing.
    """
    if checkpoint.average:
        return {}, {}
    log = checkpoint.path.parent.parent / "metrics.jsonl"
    metrics: Metrics = {}
    data: dict[str, str] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        try:
            entry = json.loads(line)
            if entry["step"] != checkpoint.step or "eval_names" not in entry:
                continue
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short
        metrics, data = {}, entry["eval_names"]
        for name, value in entry.items():
            if name.startswith("eval") and name.count("/") == 2:
                _, task, metric = name.split("/")
                metrics.setdefault(task, {})[metric] = value
    return metrics, data


def model_card(checkpoint: Checkpoint, metrics: Metrics, data: dict[str, str]) -> str:
    """Markdown with the front matter that the HuggingFace hub reads. metrics: {task: {metric: value}}; data: {task: name}."""
    c, recipe = checkpoint.config, checkpoint.recipe
    rows = [
        f"| {task} | {data.get(task, 'unknown')} | {name} | {f'{value:.4f}' if isinstance(value, float) else value} | "
        f"{_ends(values.get(f'{name}_ci95'))} |"
        for task, values in metrics.items()
        for name, value in values.items()
        if not isinstance(value, list)
    ]
    header = "| task | data | metric | value | 95% interval |\n|---|---|---|---|---|\n"
    measured = header + "\n".join(rows) if rows else "Not measured."
    siglip = c.text_pool == "last"
    kind, processor = ("SiglipModel", "AutoProcessor") if siglip else ("CLIPModel", "CLIPProcessor")
    without = (
        ""
        if checkpoint.logit_bias is None or siglip
        else (
            f"\nThe model was trained with a sigmoid loss, whose bias {checkpoint.logit_bias:.4g} has no place in a CLIPModel: add it to the "
            "logits for probabilities of single pairs. The order of similarities doesn't depend on it.\n"
        )
    )
    trained_on, batch, optim = recipe.get("data", {}), recipe.get("batch", {}), recipe.get("optim", {})
    training = (
        f"{checkpoint.step} steps, {checkpoint.samples} samples seen. Data: `{trained_on.get('train_shards')}`. Global batch\n"
        f"{batch.get('global_batch_size')}, {OPTIMIZERS[optim.get('name', 'adamw')]} with learning rate {optim.get('lr')} and weight decay "
        f"{optim.get('weight_decay')}.{' The weights are a moving average of those that were trained.' * checkpoint.average}"
        if checkpoint.step
        else f"Not by dsclip: these are the weights of `{checkpoint.path.name}`, and how they were trained isn't known here."
    )
    return f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [clip, dsclip]
---

# {recipe.get("train", {}).get("name", "CLIP")}

A CLIP model{" trained with dsclip and" * bool(checkpoint.step)} converted to `{kind}` by dsclip.

```python
from transformers import {kind}, {processor}

model = {kind}.from_pretrained("PATH_TO_THIS_FOLDER")
processor = {processor}.from_pretrained("PATH_TO_THIS_FOLDER")
```

## Architecture
Images {c.image_size} px in patches of {c.patch_size}: {c.vision_layers} layers of width {c.vision_width}. Captions of up to
{c.context_length} tokens: {c.text_layers} layers of width {c.text_width}. Embeddings of width {c.embed_dim}, activation
{c.activation}, logit scale {checkpoint.logit_scale:.2f}.

## Training
{training}

## Results
{measured}

## Limits
The model repeats the biases and errors of its training captions. Zero-shot results depend on the wording of the
prompts. It has not been checked for any use that affects people.
{without}"""


def _ends(interval: float | list[float] | None) -> str:
    return " – ".join(f"{end:.4f}" for end in interval) if isinstance(interval, list) else ""
