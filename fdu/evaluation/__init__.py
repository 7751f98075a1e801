"""Evaluation: draw before and after an erasure with the same seeds, and compare with judges and metrics."""

from __future__ import annotations

from fdu.evaluation.drawing import JUDGED_SEED, Draws, Sampling, draw
from fdu.evaluation.figures import Evaluation, Figures, evaluate
from fdu.evaluation.probes import Group, Judge, Probe, Role, groups

__all__ = [
    "JUDGED_SEED",
    "Draws",
    "Evaluation",
    "Figures",
    "Group",
    "Judge",
    "Probe",
    "Role",
    "Sampling",
    "draw",
    "evaluate",
    "groups",
]
