"""Evaluation: draw before and after an erasure with the same seeds, and compare with judges and metrics."""

from __future__ import annotations

from fdu.evaluation.drawing import JUDGED_SEED, Attribute, Draws, Judge, Probe, Sampling, draw
from fdu.evaluation.figures import Evaluation, Figures, evaluate

__all__ = [
    "JUDGED_SEED",
    "Attribute",
    "Draws",
    "Evaluation",
    "Figures",
    "Judge",
    "Probe",
    "Sampling",
    "draw",
    "evaluate",
]
