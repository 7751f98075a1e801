"""Robustness of an erasure: other phrasings, an attack on the embeddings, and relearning from a few images."""

from __future__ import annotations

from fdu.evaluation.robustness.attack import AttackConfig, AttackFigures, attack
from fdu.evaluation.robustness.examination import TESTS, Examination, Robustness, Test, check_tests
from fdu.evaluation.robustness.finetuning import Lesson
from fdu.evaluation.robustness.judging import JudgedSampling, target_latents
from fdu.evaluation.robustness.phrasings import SetFigures, read_sets
from fdu.evaluation.robustness.relearning import RelearningConfig, RelearningFigures, relearn
from fdu.evaluation.robustness.shares import Share

__all__ = [
    "TESTS",
    "AttackConfig",
    "AttackFigures",
    "Examination",
    "JudgedSampling",
    "Lesson",
    "RelearningConfig",
    "RelearningFigures",
    "Robustness",
    "SetFigures",
    "Share",
    "Test",
    "attack",
    "check_tests",
    "read_sets",
    "relearn",
    "target_latents",
]
