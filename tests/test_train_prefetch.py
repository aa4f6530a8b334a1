"""Batches are made and copied ahead of the step, each step waits for its own batch alone, and errors come in their place."""

import itertools
import threading

import pytest
import torch

from dsclip.data.batch import Batch
from dsclip.errors import UserError
from dsclip.train.prefetch import in_background, on_device, pipelined


class Lane:
    """Notes what is queued and what a step waits for."""

    def __init__(self):
        self.log = []

    def queue(self, batch):
        self.log.append(f"copy {batch}")
        return batch

    def ready(self, queued):
        self.log.append(f"wait for {queued}")
        return queued


def test_a_step_waits_for_its_own_copy_while_the_next_one_is_queued():
    lane = Lane()
    for batch in pipelined(iter(range(3)), lane):
        lane.log.append(f"step {batch}")
    assert lane.log == [
        "copy 0", "copy 1", "wait for 0", "step 0", "copy 2", "wait for 1", "step 1", "wait for 2", "step 2",
    ]  # fmt: skip


def test_the_next_batch_is_made_while_the_current_one_is_in_use():
    made = [threading.Event() for _ in range(3)]
    by = []

    def batches():
        for number in range(3):
            by.append(threading.current_thread())
            made[number].set()
            yield number

    taken = in_background(batches())
    assert next(taken) == 0 and not made[1].is_set()
    assert next(taken) == 1 and made[2].wait(timeout=30), "batch 2 is made although nobody asked yet"
    assert list(taken) == [2]
    assert by[0] is threading.main_thread() and threading.main_thread() not in by[1:]


def test_an_error_is_raised_where_its_batch_was_due():
    def batches():
        yield from range(2)
        raise UserError("the third is broken")

    taken = in_background(batches())
    assert [next(taken), next(taken)] == [0, 1]
    with pytest.raises(UserError, match="the third is broken"):
        next(taken)
    assert list(in_background(iter([]))) == []


def test_the_thread_ends_when_nobody_takes_batches_any_more():
    taken = in_background(itertools.count())
    assert [next(taken), next(taken)] == [0, 1]
    taken.close()
    assert "dsclip batches" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_batches_are_the_same_and_copies_overlap():
    device = torch.device("cuda", 0)
    images = [torch.full((64, 3, 224, 224), i, dtype=torch.uint8, pin_memory=True) for i in range(4)]
    batches = [Batch(x, torch.full((64, 8), i), torch.arange(64), state={"batches": i}) for i, x in enumerate(images)]
    for number, batch in enumerate(on_device(iter(batches), device)):
        assert batch.state == {"batches": number} and batch.images.is_cuda and not batch.tokens.is_cuda
        assert bool((batch.images == number).all()) and bool((batch.tokens == number).all())
