"""The objective of a step: a weighted sum of the loss of the pairs and further terms over named views.

Read `term.py` first, what a term is given and what it returns; then `contrast.py`, one of them; `objective.py` sums them.
A term of your own: docs/objectives.md.
"""

from dsclip.objectives.objective import Objective, ObjectiveGrads, build_objective
from dsclip.objectives.registry import make_term, register_term
from dsclip.objectives.term import Features, TeacherFeatures, Term, TermFactory, TermGrads

__all__ = [
    "Features", "Objective", "ObjectiveGrads", "TeacherFeatures", "Term", "TermFactory", "TermGrads", "build_objective", "make_term",
    "register_term",
]  # fmt: skip
