"""Distillation: the student's features, or what it compares with what, become those of a teacher.

Yang et al. 2024, "CLIP-KD", section 3.2: feature distillation (FD) and contrastive relational distillation (CRD); the latter is
the loss of Vasu et al. 2024, "MobileCLIP", eq. 1, too. The teacher's features come with the batch and have no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsclip.config.objective_section import TOWERS as TAUGHT
from dsclip.config.objective_section import ObjectiveSection, TermSection, tower_of, view_of
from dsclip.errors import UserError
from dsclip.losses import Group, Negatives
from dsclip.losses.tile_size import tile_shape
from dsclip.objectives.term import Features, TeacherFeatures, TermGrads


@dataclass(frozen=True)
class DistillFeatures:
    """The mean over samples of ‖f − t‖², of unit features f of the student and t of the teacher: 2 − 2·cos; summed over `names`.

    A name may be that of a projector's feature (image.NAME), which has the teacher's width where the student's own is another.
    """

    names: tuple[str, ...]

    def __call__(self, features: Features, *, group: Group) -> TermGrads:
        teacher = _teacher_of(features)
        values, grads = [], {}
        for name in self.names:
            student, target = _wide(features[name]), teacher.views[tower_of(name)]
            _check_width(name, student.shape[1], target.shape[1])
            difference = student - target.to(student.dtype)
            total = group.world_size * len(student)
            values.append(group.all_reduce_sum(difference.square().sum()) / total)
            grads[name] = 2 * difference / total
        return TermGrads(torch.stack(values).sum(), grads)


@dataclass(frozen=True)
class Distill:
    """½·mean KL(t_i ‖ p_i) + ½·mean KL(u_i ‖ q_i): p, q the row and column softmax of s·A·Bᵀ over the global batch, t, u those of the teacher at its own
    temperature. A and B are what `names` says, [N, D] of all ranks; no matrix of N × N is made.

    With G = (p − t + q − u)/(2N): dA = s·G·B, dB = s·Gᵀ·A, d log s = Σ G∘S.
    """

    names: tuple[str, str]
    temperature: float | None
    entries: int | None = None  # of a tile; None: by the device

    def __call__(self, features: Features, *, group: Group) -> TermGrads:
        teacher = _teacher_of(features)
        log_scale = features.log_scale
        if self.temperature is not None:
            log_scale = torch.full_like(log_scale, -math.log(self.temperature))
        student = _Side.of([_wide(features[name]) for name in self.names], log_scale.exp(), group)
        target = _Side.of(
            [teacher.views[name] for name in self.names], math.exp(teacher.log_scale), group, like=student
        )
        rows, columns = self._softmaxes(student, target, group), self._softmaxes(student.turned, target.turned, group)
        total = 2 * len(student.everyone[0])
        value, d_one, d_scale = self._gradient(student, target, rows, columns, total)
        # The same matrix from the columns' side, for this rank's rows of the other feature; its value has been counted.
        _, d_other, _ = self._gradient(student.turned, target.turned, columns, rows, total)
        value = group.all_reduce_sum(value)
        shared = None if self.temperature is not None else group.all_reduce_sum(d_scale).to(features.log_scale.dtype)
        return TermGrads(value, dict(zip(self.names, (d_one, d_other), strict=True)), shared)

    def _tiles(self, side: _Side) -> list[slice]:
        n, total = len(side.local[0]), len(side.everyone[1])
        height, width = tile_shape(n, total, 1, self.entries, side.local[0].device)
        height = max(1, height * width // total)  # whole rows
        return [slice(start, min(n, start + height)) for start in range(0, n, height)]

    def _softmaxes(self, student: _Side, target: _Side, group: Group) -> tuple[Tensor, Tensor]:
        """Log-sum-exps [N] of all rows, the student's and the teacher's. Collective."""
        found = [
            torch.stack([torch.logsumexp(side.logits(part), 1) for side in (student, target)], 1)
            for part in self._tiles(student)
        ]
        of_student, of_teacher = group.all_gather(torch.cat(found)).unbind(1)
        return of_student, of_teacher

    def _gradient(
        self, student: _Side, target: _Side, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor], total: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(this rank's part of the value, gradient of its rows of the first feature, its part of that of log s)."""
        value = d_scale = student.local[0].new_zeros(())
        grads, first = [], student.first
        for part in self._tiles(student):
            mine = slice(first + part.start, first + part.stop)
            logits, goal = student.logits(part), target.logits(part)
            g = torch.zeros_like(logits)
            for ours, theirs in ((x[:, None] for x in (rows[0][mine], rows[1][mine])), (x[None] for x in columns)):
                log_p, log_t = logits - ours, goal - theirs
                t = log_t.exp()
                value = value + (t * (log_t - log_p)).sum() / total
                g += (log_p.exp() - t) / total
            grads.append(student.scale * (g @ student.everyone[1]))
            d_scale = d_scale + (g * logits).sum()
        return value, torch.cat(grads), d_scale


@dataclass(frozen=True)
class _Side:
    """Two features of student or teacher: this rank's rows [n, D], everyone's [N, D], and the factor of their similarities. first: of this rank's rows."""

    local: tuple[Tensor, Tensor]
    everyone: tuple[Tensor, Tensor]
    scale: Tensor | float
    first: int

    @classmethod
    def of(cls, views: list[Tensor], scale: Tensor | float, group: Group, like: _Side | None = None) -> _Side:
        """Collective. like: whose dtype is taken."""
        one, other = (x if like is None else x.to(like.local[0].dtype) for x in views)
        everyone = group.all_gather(one.contiguous()), group.all_gather(other.contiguous())
        return cls((one, other), everyone, scale, group.rank * len(one))

    @property
    def turned(self) -> _Side:
        """The second feature's rows against the first's."""
        return _Side(self.local[::-1], self.everyone[::-1], self.scale, self.first)

    def logits(self, part: slice) -> Tensor:
        """Of some of this rank's rows, [m, N]."""
        return self.scale * (self.local[0][part] @ self.everyone[1].T)


def distill(settings: TermSection, negatives: Negatives) -> Distill:
    """The term of these settings."""
    if sorted(settings.between) != sorted(TAUGHT):
        raise UserError(
            "objective.terms: `distill` compares similarities of images and texts; give between: [image, text]"
        )
    one, other = settings.between
    return Distill((one, other), settings.temperature)


def distill_features(settings: TermSection, negatives: Negatives) -> DistillFeatures:
    """The term of these settings."""
    if unknown := next((name for name in settings.between if view_of(name) not in TAUGHT), None):
        raise UserError(
            f"objective.terms: a teacher has features of image and text, and none of {unknown}; leave it out of `distill_features`"
        )
    return DistillFeatures(tuple(settings.between))


def check_widths(objective: ObjectiveSection, own: int, teacher: int) -> None:
    """Raises UserError when `distill_features` compares features of another width than the teacher's. own: of the student's views."""
    for term in objective.terms:
        if term.name == distill_features.__name__:
            for name in term.between:
                _check_width(name, objective.width_of(name, own), teacher)


def _check_width(name: str, student: int, teacher: int) -> None:
    if student != teacher:
        raise UserError(
            f"objective.terms: `distill_features` compares the {student} numbers of {name} with the teacher's {teacher}; "
            f"give a head of kind: projector with width: {teacher}, or take `distill`, which compares similarities"
        )


def _teacher_of(features: Features) -> TeacherFeatures:
    if features.teacher is None:
        raise UserError(
            "a term of the objective distils, and there are no features of a teacher; set objective.teacher"
        )
    return features.teacher


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
