"""Batches that a run leaves out, what is written of them, and what a guard remembers over a resume."""

import json
from types import SimpleNamespace

import pytest
import torch

from dsclip.checkpoint import Lineage
from dsclip.checkpoint.lineage import write_lineage
from dsclip.config.schema import Recipe
from dsclip.config.train_section import TrainSection
from dsclip.data.batch import Batch, LoadReport
from dsclip.distributed import Collectives
from dsclip.engine.host_copy import HostCopy
from dsclip.engine.step_metrics import StepMetrics
from dsclip.errors import RunDiverged
from dsclip.train.guard import Guard, RollBack, without_skipped
from dsclip.train.run_folder import RunFolder
from dsclip.train.spike_rule import SpikeRule
from dsclip.train.watch import Watch
from tests.test_train_run_folder import checkpoint


def batch(number: int) -> Batch:
    journal = [{"shard": f"{number}.tar", "what": "damaged", "detail": ""}] if number % 2 else []
    report = LoadReport(captions=[str(number)], read=2, bad={"no caption": 1}, journal=journal, epoch=number / 10)
    return Batch(
        torch.zeros(1, 3, 2, 2), torch.zeros(1, 4), torch.tensor([number]), state={"batches": number}, report=report
    )


def test_batches_are_left_out_by_number_and_what_is_told_of_their_shards_is_kept():
    lineage = Lineage("a", skipped=((2, 4), (7, 7)))
    found = list(without_skipped(map(batch, range(1, 10)), lineage))
    assert [b.state["batches"] for b in found] == [1, 5, 6, 8, 9]
    journals = [[int(entry["shard"].split(".")[0]) for entry in b.report.journal] for b in found]
    assert journals == [[1], [3, 5], [], [7], [9]]
    assert [b.report.read for b in found] == [2, 8, 2, 4, 2] and found[1].report.bad == {"no caption": 4}
    assert (found[1].report.captions, found[1].report.epoch) == (["5"], 0.5), "of its own samples"
    assert [b.state["batches"] for b in without_skipped(map(batch, range(3)), Lineage("a"))] == [0, 1, 2]


def test_every_batch_that_is_left_out_has_a_line(tmp_path):
    for first in (5, 9):
        RollBack("it jumped", 3, (first, first + 1), {first: None, first + 1: [7, 8]}).write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    assert [(line["batch"], line["sample_ids"]) for line in lines] == [(5, None), (6, [7, 8]), (9, None), (10, [7, 8])]
    RollBack("again", 3, (10, 11), {10: None, 11: [1]}).write(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "skipped_batches.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == [5, 6, 9, 10, 11], "each once"
    assert lines[3] == {"batch": 10, "why": "it jumped", "sample_ids": [7, 8]}


def test_a_step_that_was_saved_before_it_was_judged_is_judged_after_the_resume():
    """As when a signal stops the run. Neither the folder nor what people see has a part in it."""
    rule = SpikeRule(10, 8.0)
    for step in range(1, 12):
        rule.judge(step, 1.0, 2.0)
    for norm in (2.5, None):
        state = {"rule": rule.state(), "recent": [[11, 14], [12, 15]], "unjudged": [12, 1.25, norm]}
        guard = Guard(TrainSection(spike_window=10), Collectives.single(), None, None, json.loads(json.dumps(state)))
        assert json.loads(json.dumps(guard.state())) == json.loads(json.dumps(state))
        guard.judge()
        after = guard.state()
        assert (after["unjudged"], after["rule"]["losses"][-1]) == (None, 1.25)
        assert [(step, loss) for step, loss, *_ in after["rule"]["deviating"]] == [(12, 1.25)] and len(
            after["rule"]["log_norms"]
        ) == 10


@pytest.fixture
def guarded(tmp_path, capsys):
    """What a guard does about steps, given as their losses, in a folder with checkpoints of these steps."""

    def go(losses: dict[int, float | None], *saved: int, parent_step: int = 0, spiked_before: int = 0, **settings):
        parent = {"run": "b", "step": parent_step, "path": "b", "sha256": ""} if parent_step else None
        folder = RunFolder(tmp_path, "auto", Collectives.single())
        folder.lineage = Lineage("a", parent=parent, skipped=((1, 1),) * spiked_before)
        write_lineage(tmp_path, folder.lineage)
        for step in saved:
            checkpoint(tmp_path, step, {"run": "a", "branch": 1, "start": 0, "steps": []})
        train = TrainSection(steps=100, log_every=1000, spike_window=10, **settings)
        inputs = SimpleNamespace(recipe=Recipe(train=train), run_dir=tmp_path, ds_config={})
        engine = SimpleNamespace(group=Collectives.single(), step=parent_step)
        watch = Watch(inputs, engine, SimpleNamespace(counters=None, record=None))
        guard = Guard(train, Collectives.single(), folder, watch, None)
        numbers = (
            "accuracy_image_to_text",
            "accuracy_text_to_image",
            "log_scale",
            "masked_negatives",
            "hard_negatives",
        )
        try:
            for step, loss in losses.items():
                figures = HostCopy(
                    {"loss": torch.tensor(loss or 0.0), "grad_norm": torch.tensor(1.0)}
                    | dict.fromkeys(numbers, torch.zeros(()))
                )
                why = None if loss else "loss on 1 of 1 ranks"
                metrics = StepMetrics(step, 1e-3, loss is None, why, 0, figures, pulse=figures)
                watch.step(metrics, batch(step), 0.0, 0.1)
                guard.step(metrics, batch(step))
            guard.judge()
        finally:
            watch.close()
            folder.release()
        return capsys.readouterr().err

    return go


NONFINITE = {"on_nonfinite": "rollback", "max_nonfinite_steps": 3}


def test_steps_that_are_not_finite_are_left_out_alone(guarded):
    """They were skipped: the last checkpoint before them is whole."""
    losses = {**dict.fromkeys(range(1, 6), 1.0), **dict.fromkeys((6, 7, 8), None)}
    with pytest.raises(RollBack) as back:
        guarded(losses, 2, 4, 6, **NONFINITE)
    assert (back.value.before, back.value.batches, list(back.value.samples)) == (6, (6, 8), [6, 7, 8])


def test_what_can_be_done_without_a_checkpoint_is_true(guarded):
    losses = {**dict.fromkeys(range(1, 6), 1.0), **dict.fromkeys((6, 7, 8), None)}
    said = guarded(losses, 6, **NONFINITE)
    assert "no checkpoint from before step 6 is there" in said and "Lower train.save_every to have one" in said


@pytest.mark.parametrize("begun", [0, 50])
def test_a_run_that_begins_with_trouble_is_not_told_to_save_more(guarded, begun):
    losses = dict.fromkeys(range(begun + 1, begun + 4), None)
    said = guarded(losses, parent_step=begun, **NONFINITE)
    assert f"None can be: the run began with step {begun + 1}" in said and "save_every" not in said


def test_who_may_go_back_no_more_is_given_a_checkpoint_from_before_the_spike(guarded, tmp_path):
    """Step 50 deviated first, alone, and was saved."""
    losses = {**dict.fromkeys(range(30, 50), 1.0), 50: 4.0, 51: 4.0}
    settings = {"on_spike": "rollback", "max_rollbacks": 1, "spiked_before": 1}
    with pytest.raises(RunDiverged) as ended:
        guarded(losses, 50, **settings)
    assert "begin afresh in another folder with train.name=NAME" in str(ended.value)
    for saved in (46, 40):  # the second is also from before what may have led to it
        with pytest.raises(RunDiverged) as ended:
            guarded(losses, saved, **settings)
        assert str(ended.value).endswith(f"--resume {tmp_path}/checkpoints/step_{saved:08d}")
        assert "auto" not in str(ended.value) and "Nothing is saved" not in str(ended.value)
