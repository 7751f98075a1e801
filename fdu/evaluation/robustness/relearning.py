"""Relearning: the number of fine-tuning steps on images of the target that restore it."""

from __future__ import annotations

import dataclasses

from fdu.config import TRAIN_METHODS, Count, Positive, check_choice, check_fields
from fdu.evaluation.robustness.finetuning import Lesson
from fdu.evaluation.robustness.judging import Course, back_after
from fdu.training.methods import Request, attach
from fdu.training.process import seeded


@dataclasses.dataclass(frozen=True)
class RelearningConfig:
    """Settings of the fine-tuning."""

    train_method: str = "lora"
    """What is trained, as in an erasure."""
    rank: Count = 16
    """Rank of LoRA and DoRA."""
    steps: Count = 80
    """Optimizer steps at most."""
    learning_rate: Positive = 1e-3
    """Of AdamW, constant."""
    batch_size: Count = 16
    """Noised images per step, >= 1."""
    looks: Count = 6
    """How often the pipeline is judged on the way, the steps doubling from look to look."""

    def __post_init__(self) -> None:
        check_choice("train_method", self.train_method, TRAIN_METHODS)
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class RelearningFigures:
    """What fine-tuning brought back."""

    course: Course
    """From step 0 on."""
    back_after: int | None
    """The steps after which half of ``drawn_before`` is reached; None for never."""
    images: int
    """How many images of the target it learnt from."""
    config: RelearningConfig
    drawn_before: float = 1.0
    """The share of images that showed the target before the erasure."""

    def __post_init__(self) -> None:
        if not self.course:
            raise ValueError("course must start at step 0")


def relearn(lesson: Lesson, config: RelearningConfig | None = None) -> RelearningFigures:
    """Fine-tune a pipeline on images of the target, judge it on the way, and undo it all: the pipeline is as before."""
    config, seed, denoiser = config or RelearningConfig(), lesson.drawing.seed, lesson.denoiser
    course: Course = [(0, lesson.judged())]
    request = Request(config.train_method, config.rank, config.rank, [lesson.probe.name], lesson.probe.prompts)
    with seeded(seed, denoiser.device):
        trainable = attach(denoiser, request)
    try:
        lesson.learn(trainable, config, course, seed, "relearn")
    finally:
        trainable.remove()
    known = lesson.drawn_before
    return RelearningFigures(course, back_after(course, known), len(lesson.latents), config, known)
