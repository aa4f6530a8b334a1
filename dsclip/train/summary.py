"""The end of a run: `summary.json` for programs, `summary.md` for people, and a few lines on the console."""

from __future__ import annotations

import json
from pathlib import Path

from dsclip.command_line import format_seconds
from dsclip.evaluate.results.intervals import table
from dsclip.files import write_whole
from dsclip.train.records import Resume, Summary

SPIKES_SHOWN = 5  # the last; all are in summary.json


def write_summary(run_dir: Path, summary: Summary) -> None:
    """Writes both files."""
    run_dir = Path(run_dir)
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_whole(run_dir / "summary.md", markdown(summary, run_dir))


def next_commands(summary: Summary, run_dir: Path) -> list[tuple[str, str]]:
    """(what for, command) of what people do after a run."""
    model = summary["hf_export"] or summary["checkpoint"]
    commands = [("watch the curves and pictures", f"tensorboard --logdir {Path(run_dir).parent}")]
    for task, shards in list(summary["eval_data"].items())[:1]:
        commands.append(
            ("evaluate", f"python launchers/evaluate.py --model {model} --task {task} --data {_argument(shards)}")
        )
    if summary["convertible"]:
        commands.append(("convert", f"python tools/convert_hf.py {summary['checkpoint']} OUT --dtype bf16"))
    return commands + [
        ("your own data", "python tools/make_shards.py FOLDER_OR_ZIP data/mine"),
        ("train on it", "deepspeed launchers/train.py --config data/mine/recipe.yaml"),
    ]


def _argument(shards: str | list[str]) -> str:
    return shards if isinstance(shards, str) else "::".join(shards)


def result_rows(summary: Summary) -> list[tuple[str, str]]:
    """(metric, value) as people read them."""
    return [
        (f"{task} {name} on {summary['eval_names'][task]}", f"{value} ({between})" if between else value)
        for task, metrics in summary["eval"].items()
        for name, value, between in table(metrics, digits=1)
    ]


def markdown(summary: Summary, run_dir: Path) -> str:
    """The text of summary.md."""
    rate = summary.get("samples_per_second")
    data = summary.get("train_shards")
    rows = [
        *([("model", summary["model"]), ("trained on", _argument(data))] if data else []),
        *([("global batch", summary["global_batch_size"])] if data else []),
        ("steps", summary["steps"]),
        ("samples seen", f"{summary['samples']:,}"),
        ("time", format_seconds(summary["seconds"])),
        ("samples a second", "-" if rate is None else f"{rate:.0f}"),
        ("last loss", "-" if summary["loss"] is None else f"{summary['loss']:.4f}"),
        ("memory a rank", _memory(summary)),
        ("skipped steps", summary.get("skipped_steps", 0)),
        ("bad samples", ", ".join(f"{n} {r}" for r, n in summary.get("bad_samples", {}).items()) or "none"),
        *(("evaluation failed", f"step {e['step']}: {e['error']}") for e in summary.get("evaluation_errors", ())),
        *(("resumed", _resumed(r)) for r in summary.get("resumes", ())),
        *_trouble(summary),
        *result_rows(summary),
        ("checkpoint", f"`{summary['checkpoint']}`"),
        ("HuggingFace folder", f"`{summary['hf_export']}`" if summary["hf_export"] else "not written"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    commands = "\n".join(f"# {what}\n{command}" for what, command in next_commands(summary, run_dir))
    return f"# {Path(run_dir).name}\n\n| | |\n|---|---|\n{table}\n\n## What next\n\n```bash\n{commands}\n```\n"


def _memory(summary: Summary) -> str:
    used, planned = summary.get("memory_gb"), summary.get("planned_memory_gb")
    return "-" if used is None or planned is None else f"{used:.1f} GB, planned {planned:.1f} GB"


def _done(summary: Summary) -> str:
    text = f"Done: {summary['steps']} steps"
    launch = summary.get("launch")
    if launch and launch["steps"] != summary["steps"] - launch["from_step"]:
        return f"{text}. This launch went back, made {launch['steps']} steps, and took {format_seconds(launch['seconds'])}."
    if not launch or not summary.get("resumes"):
        return f"{text} in {format_seconds(summary['seconds'])}."
    return f"{text}, {launch['steps']} of them in this launch, which took {format_seconds(launch['seconds'])}."


def _notes(summary: Summary) -> list[str]:
    """What went wrong or changed on the way."""
    notes = [f"  resumed     {_resumed(r)}" for r in summary.get("resumes", ())]
    notes += [f"  {name:<11} {what}" for name, what in _trouble(summary)]
    if summary.get("skipped_steps"):
        notes.append(f"  skipped     {summary['skipped_steps']} steps, because something in them was not finite")
    if bad := summary.get("bad_samples"):
        notes.append(f"  bad samples {', '.join(f'{n} {reason}' for reason, n in bad.items())}")
    return notes + [
        f"  evaluation  failed at step {e['step']}: {e['error']}" for e in summary.get("evaluation_errors", ())
    ]


def _trouble(summary: Summary) -> list[tuple[str, str]]:
    """(what, more of it) of spikes, rollbacks and what they left out."""
    spikes, left_out = summary.get("spikes", []), summary.get("left_out_batches", [])
    rows = [("went back", f"to step {r['step']}: {r['why']}") for r in summary.get("rollbacks", ())]
    if spikes:
        more = f" and {len(spikes) - SPIKES_SHOWN} times before" * (len(spikes) > SPIKES_SHOWN)
        rows.append(("loss jumped", "in steps " + _ranges([s["steps"] for s in spikes[-SPIKES_SHOWN:]]) + more))
    if left_out:
        count = len({batch for first, last in left_out for batch in range(first, last + 1)})
        rows.append(("left out", f"{count} batches: {_ranges(left_out)}"))
    return rows


def _ranges(pairs: list[list[int]]) -> str:
    return ", ".join(f"{first} to {last}" for first, last in pairs)


def _resumed(resume: Resume) -> str:
    changes = ", ".join(f"{key} {old} → {new}" for key, (old, new) in resume["changes"].items())
    return f"at step {resume['step']}" + (f" with {changes}" if changes else "")


def console_summary(summary: Summary, run_dir: Path) -> str:
    """What the run prints last: results first, then what to do with them."""
    lines = ["", _done(summary), *_notes(summary)]
    names = summary["eval_names"]
    results = {t: {k: v for k, v in m.items() if not isinstance(v, list)} for t, m in summary["eval"].items()}
    if "zeroshot" in results:
        z = results["zeroshot"]
        where = f"{z['classes']} classes, {z['samples']} images of {names['zeroshot']}"
        lines.append(f"  zero-shot top-1 {z['top1']:.1%} over {where}")
    if "retrieval" in results:
        r = results["retrieval"]
        for way, key in (("image to text", "image_to_text"), ("text to image", "text_to_image")):
            found = {k: r[name] for k in (1, 5, 10) if (name := f"{key}_recall@{k}") in r}
            ks, recalls = "/".join(map(str, found)), " / ".join(f"{share:.1%}" for share in found.values())
            lines.append(f"  {way} recall@{ks} {recalls} on {names['retrieval']}")
    if "hard_negatives" in results:
        h = results["hard_negatives"]
        lines.append(
            f"  own caption above a hard negative {h['accuracy']:.1%} of {h['pairs']} times on {names['hard_negatives']}"
        )
    lines += [
        f"  checkpoint  {summary['checkpoint']}",
        f"  HuggingFace {summary['hf_export'] or 'not written'}",
        f"  summary     {run_dir}/summary.md",
    ]
    lines += ["", "Next:"]
    lines += [f"  # {what}\n  {command}" for what, command in next_commands(summary, run_dir)]
    return "\n".join(lines)
