"""Robustness of an erasure: other phrasings, an attack on the embeddings, and relearning from a few images."""

from __future__ import annotations

from fdu.evaluation.drawing import JudgedSampling
from fdu.evaluation.robustness.attack import AttackConfig, attack
from fdu.evaluation.robustness.examination import TESTS, USUAL, Examination, Robustness
from fdu.evaluation.robustness.phrasings import read_sets
from fdu.evaluation.robustness.relearning import Lesson, RelearningConfig, relearn, target_latents

__all__ = [
    "TESTS",
    "USUAL",
    "AttackConfig",
    "Examination",
    "JudgedSampling",
    "Lesson",
    "RelearningConfig",
    "Robustness",
    "attack",
    "read_sets",
    "relearn",
    "target_latents",
]
