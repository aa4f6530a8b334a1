"""Which checkpoints lead to a run's state: each step stands once, and later ones of another branch are left."""

from dsclip.checkpoint.lineage import Lineage, continued, read_lineage, write_lineage


def test_a_step_that_is_saved_again_stands_once_and_ends_the_line():
    lineage = Lineage("a", steps=(2, 4, 6))
    assert lineage.saved(8).steps == (2, 4, 6, 8)
    assert lineage.saved(6).steps == (2, 4, 6)
    assert lineage.saved(4).steps == (2, 4)


def manifest(step, *earlier):
    return {"step": step, "lineage": {"run": "a", "branch": 1, "start": 0, "steps": list(earlier)}}


def test_a_run_goes_on_from_its_checkpoint_and_what_came_before_it(tmp_path):
    write_lineage(tmp_path, Lineage("a"))
    for earlier in ((2,), (2, 4), (2, 4, 6)):
        found = continued(tmp_path, tmp_path / "4", manifest(4, *earlier), same_run=True, later=[])
        assert found == Lineage("a", steps=(2, 4))


def test_a_rewind_begins_a_branch_that_leaves_the_later_steps(tmp_path):
    write_lineage(tmp_path, Lineage("a", branch=3, start=1))
    found = continued(tmp_path, tmp_path / "4", manifest(4, 2, 4), same_run=True, later=[6, 8])
    assert found == Lineage("a", branch=4, start=4, steps=(2, 4), abandoned=(6, 8))
    write_lineage(tmp_path, found)
    assert read_lineage(tmp_path) == Lineage("a", branch=4, start=4, abandoned=(6, 8))


def test_batches_that_are_left_out_stay_out_whatever_is_continued(tmp_path):
    """Those of the run and of the checkpoint, once each; and of another run's checkpoint."""
    write_lineage(tmp_path, Lineage("a", skipped=((3, 5), (9, 9))))
    assert read_lineage(tmp_path).skipped == ((3, 5), (9, 9))
    of_checkpoint = manifest(4, 2)
    of_checkpoint["lineage"]["skipped"] = [[3, 5], [11, 12]]
    found = continued(tmp_path, tmp_path / "4", of_checkpoint, same_run=True, later=[])
    assert found.skipped == ((3, 5), (9, 9), (11, 12))
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "dsclip.json").write_text("{}")
    assert continued(tmp_path, tmp_path / "4", of_checkpoint, same_run=False, later=[]).skipped == ((3, 5), (11, 12))
    assert [found.skips(batch) for batch in (2, 3, 5, 6, 9, 12)] == [False, True, True, False, True, True]
