"""Any task beside itself on corrupted pictures: what of a metric is left, per corruption and on average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsclip.data.corruptions.corruption import SIZE, Corruption
from dsclip.evaluate.results.result import Measured, Outcomes
from dsclip.evaluate.tasks.task import Embedded, Images, Task


class Corrupted:
    """The task's metrics, then of the first one M: `M_NAME_SEVERITY` for each corruption, `M_NAME` over its severities where there are several, `M_corrupted` over
    corruptions and `M_retained`, its share of M; of every other metric its mean over corruptions, `…_corrupted`.

    Only the last of the task's sets is corrupted: probes learn from clean pictures. Severity 0 counts in no mean.
    """

    def __init__(self, task: Task, corruptions: Sequence[Corruption]):
        self._task, self._corruptions, self._sets = task, corruptions, len(task.images)
        test = task.images[-1]
        self.images = (
            *task.images, *(Images(test.dataset.corrupted(corruption), test.indices) for corruption in corruptions)
        )  # fmt: skip
        self.texts = task.texts
        self.protocol: Mapping[str, Any] = {
            **task.protocol, "corruptions": [str(corruption) for corruption in corruptions],
            "corruption_seed": corruptions[0].seed, "corrupted_at": f"{SIZE} pixels, resized and cropped",
        }  # fmt: skip

    def measure(self, images: Iterable[Embedded], text: Tensor) -> Measured:
        """Takes the sets one after another, so that no two corruptions' features need be in memory."""
        embedded = iter(images)
        *others, clean = [next(embedded) for _ in range(self._sets)]
        of_clean = self._task.measure([*others, clean], text)
        main = next(iter(of_clean.outcomes))
        found = [
            (corruption, self._task.measure([*others, part], text).outcomes)
            for corruption, part in zip(self._corruptions, embedded, strict=True)
        ]
        outcomes, counts = dict(of_clean.outcomes), dict(of_clean.counts)
        outcomes |= {f"{main}_{c.name}_{c.severity}": of_metric[main] for c, of_metric in found}
        for metric in of_clean.outcomes:
            of_name: dict[str, list[Outcomes]] = {}
            for corruption, of_metric in found:
                if corruption.severity > 0 and metric in of_metric:
                    of_name.setdefault(corruption.name, []).append(of_metric[metric])
            if not of_name:
                continue
            if metric == main:
                for name, results in of_name.items():
                    if len(results) > 1:
                        _put(f"{main}_{name}", mean_of(results), outcomes, counts)
            _put(f"{metric}_corrupted", mean_of([mean_of(results) for results in of_name.values()]), outcomes, counts)
        left = (
            outcomes[f"{main}_corrupted"].value()
            if f"{main}_corrupted" in outcomes
            else counts.get(f"{main}_corrupted")
        )
        if left is not None and of_clean.outcomes[main].value() > 0:
            counts[f"{main}_retained"] = left / of_clean.outcomes[main].value()
        return Measured(outcomes, counts)


def mean_of(results: Sequence[Outcomes | float]) -> Outcomes | float:
    """The mean of metrics: as values of samples where it is that of the samples' means, otherwise as a number alone."""
    first = results[0]
    if isinstance(first, Outcomes) and all(isinstance(found, Outcomes) and _alike(first, found) for found in results):
        values = torch.stack([found.values.double() for found in results if isinstance(found, Outcomes)])
        return replace(first, values=values.mean(dim=0))
    numbers = [found.value() if isinstance(found, Outcomes) else found for found in results]
    return sum(numbers) / len(numbers)


def _alike(a: Outcomes, b: Outcomes) -> bool:
    same_groups = a.groups is b.groups or (a.groups is not None and b.groups is not None and a.groups.equal(b.groups))
    return (
        a.reduction == b.reduction
        and a.reduction in ("mean", "mean_of_groups")
        and a.units.equal(b.units)
        and same_groups
    )


def _put(name: str, found: Outcomes | float, outcomes: dict[str, Outcomes], counts: dict[str, int | float]) -> None:
    if isinstance(found, Outcomes):
        outcomes[name] = found
    else:
        counts[name] = found
