"""Relearning: how many steps of fine-tuning on images of the target bring it back."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from fdu.config import TRAIN_METHODS
from fdu.evaluation import Probe
from fdu.evaluation.robustness.finetuning import check_settings, fine_tune
from fdu.evaluation.robustness.judging import Course, JudgedSampling, back_after, count, spaced
from fdu.models.denoiser import Denoiser
from fdu.training.methods import attach
from fdu.training.process import seeded


@dataclasses.dataclass(frozen=True)
class RelearningConfig:
    """Settings of the fine-tuning."""

    train_method: str = "lora"
    """What is trained, as in an erasure."""
    rank: int = 16
    """Rank of LoRA and DoRA."""
    steps: int = 80
    """Optimizer steps at most."""
    learning_rate: float = 1e-3
    """Of AdamW, constant."""
    batch_size: int = 16
    """Noised images a step."""
    looks: int = 6
    """How often the pipeline is judged on the way, the steps doubling from look to look."""

    def __post_init__(self) -> None:
        if self.train_method not in TRAIN_METHODS:
            raise ValueError(f"train_method must be one of {', '.join(TRAIN_METHODS)}, got {self.train_method!r}")
        check_settings(self, ("rank", "steps", "batch_size", "looks"))


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
            raise ValueError("course must begin with what was drawn at step 0")

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def relearn(
    denoiser: Denoiser,
    probe: Probe,
    latents: Tensor,
    config: RelearningConfig | None = None,
    drawing: JudgedSampling | None = None,
    drawn_before: float | None = None,
) -> RelearningFigures:
    """Fine-tune a pipeline on images of the target, judge it on the way, and undo it all: the pipeline is as before.

    Args:
        denoiser: of the pipeline, erased or not.
        probe: the target's prompts, and who judges the images.
        latents: clean latents [M, C, H, W] of the target, of :func:`fdu.evaluation.robustness.judging.target_latents`.
        config: the settings.
        drawing: how judged images are drawn.
        drawn_before: the share that the target's prompts drew before the erasure, half of which counts as back; None:
            all images.
    """
    config, drawing = config or RelearningConfig(), drawing or JudgedSampling()
    course: Course = [(0, count(denoiser, probe, drawing))]
    with seeded(drawing.seed, denoiser.device):
        trainable = attach(
            denoiser,
            config.train_method,
            rank=config.rank,
            lora_alpha=config.rank,
            target_name=probe.name,
            prompts=probe.prompts,
        )
    try:
        fine_tune(
            denoiser,
            trainable,
            probe.prompts,
            latents,
            steps=config.steps,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            seed=drawing.seed,
            description="relearn",
            watched=spaced(config.steps, config.looks),
            watch=lambda step: course.append((step, count(denoiser, probe, drawing))),
        )
    finally:
        trainable.remove()
    known = 1.0 if drawn_before is None else drawn_before
    return RelearningFigures(course, back_after(course, known), len(latents), config, known)
