"""Threads as ranks: real all-gathers and sums, without processes."""

import threading

import torch


class ThreadRanks:
    """`run(function)` calls function(group) once a rank, each in a thread of its own."""

    def __init__(self, world_size, in_ring=False):
        self.in_ring = in_ring
        self.world_size, self.barrier, self.slots = world_size, threading.Barrier(world_size), [None] * world_size

    def run(self, function):
        """The results in rank order. The first error of a rank is raised."""
        results, errors = [None] * self.world_size, []

        def work(rank):
            try:
                results[rank] = function(ThreadRank(self, rank))
            except threading.BrokenBarrierError:
                pass
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.world_size)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        if errors:
            raise errors[0]
        return results


class ThreadRank:
    """One rank's `Group`."""

    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.world_size, self.in_ring = ranks, rank, ranks.world_size, ranks.in_ring

    def _exchange(self, x):
        self.ranks.slots[self.rank] = x
        self.ranks.barrier.wait()
        values = list(self.ranks.slots)
        self.ranks.barrier.wait()
        return values

    def pass_on(self, sent, received):
        def wait():
            before = self._exchange(sent)[self.rank - 1]
            for into, x in zip(received, before, strict=True):
                assert into.shape == x.shape, "a ring needs equal shapes on all ranks"
                into.copy_(x)
            self.barrier()  # a sender may write over what it sent only when it has arrived

        return wait

    def all_gather(self, x):
        parts = self._exchange(x)
        assert len({p.shape for p in parts}) == 1, "a collective needs equal shapes on all ranks"
        return torch.cat(parts)

    def all_reduce_sum(self, x):
        return torch.stack(self._exchange(x)).sum(dim=0)

    def all_gather_object(self, x):
        return self._exchange(x)

    def broadcast_object(self, x):
        return self._exchange(x)[0]

    def meet(self, word, timeout_s):
        return self._exchange(word)

    def barrier(self):
        self._exchange(None)
