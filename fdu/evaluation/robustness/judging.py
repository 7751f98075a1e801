"""Shared by the robustness tests: images of the target to learn from, and judged images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fdu.config import Count, Natural, check_number
from fdu.evaluation import JUDGED_SEED, Probe, Sampling, draw
from fdu.evaluation.drawing import unchecked
from fdu.evaluation.intervals import wilson
from fdu.models.denoiser import Denoiser, call_default, silent

LEARNT_SEED = 3000
"""Offset of the seeds of the target's images that attack and relearning learn from: none that are judged."""

BACK = 0.5
"""The target is back once this part of the share before the erasure shows it."""


@dataclasses.dataclass(frozen=True)
class Share:
    """So many of so many images."""

    value: float
    """In [0, 1]."""
    images: int
    """How many were judged."""
    interval: tuple[float, float]
    """The 95 % interval of Wilson (1927), which also holds near 0 and 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(f"a share must be in [0, 1], got {self.value!r}")

    @classmethod
    def of(cls, seen: Sequence[str], name: str) -> Share:
        """The share of ``name`` among what a judge saw.

        Raises:
            ValueError: it saw nothing.
        """
        if not seen:
            raise ValueError("a share needs at least one image")
        count = sum(one == name for one in seen)
        return cls(count / len(seen), len(seen), wilson(count / len(seen), len(seen)))


Course = list[tuple[int, Share]]
"""Steps, and the share of images that show the target after them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedSampling(Sampling):
    """How judged images are drawn.

    Raises:
        ValueError: no image, or as :class:`Sampling`.
    """

    images: Count = 32
    """Images whose share is counted."""
    seed: Natural = 0
    """Of everything random; the images begin with ``seed + JUDGED_SEED``."""


def target_latents(denoiser: Denoiser, probe: Probe, number: int = 32, drawing: JudgedSampling | None = None) -> Tensor:
    """Clean latents [number, C, H, W] of the target, drawn by a pipeline that still knows it.

    Latent i is of prompt i, modulo their number. For images of your own, take ``denoiser.encode_images``.

    Raises:
        ValueError: number < 1.
    """
    check_number("latents", number, Count)
    drawing = drawing or JudgedSampling()
    conditioning = denoiser.encode([*probe.prompts, ""])
    chosen = [index % len(probe.prompts) for index in range(number)]
    seeds = [drawing.seed + LEARNT_SEED + index for index in range(number)]
    steps: int = drawing.num_inference_steps or call_default(denoiser.pipeline, "num_inference_steps")
    guidance = drawing.guidance_scale
    if guidance is None:
        guidance = call_default(denoiser.pipeline, "guidance_scale")
    empty = len(probe.prompts)
    return denoiser.draw_latents(conditioning, chosen, empty, steps, guidance, seeds, drawing.batch_size)


class Conditioned:
    """A pipeline that is handed what its denoiser encodes, perturbed or not, instead of the prompts themselves."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Nothing to set: the pipeline has no bar of its own in a call, and keeps its settings."""

    def __call__(self, prompts: Sequence[str], **settings: Any) -> Any:
        """Draw the images of prompts, with settings of the pipeline's call."""
        conditioning = self.denoiser.encode(prompts)
        with silent(self.denoiser.pipeline), unchecked(self.denoiser.pipeline):
            return self.denoiser.pipeline(**self.denoiser.call_arguments(conditioning), **settings)


def seen_by_judge(
    denoiser: Denoiser, probes: Sequence[Probe], drawing: JudgedSampling, description: str
) -> list[list[str]]:
    """What the judge of each probe sees in its images."""
    seed, settings = drawing.seed + JUDGED_SEED, drawing.settings()
    drawn = draw(Conditioned(denoiser), probes, drawing.images, seed, **settings, description=description)
    return [probe.judge(images) for probe, images in zip(probes, drawn.images, strict=True)]


def count(denoiser: Denoiser, probe: Probe, drawing: JudgedSampling) -> Share:
    """The share of images of the probe's prompts that show what they ask for, by the probe's judge."""
    (seen,) = seen_by_judge(denoiser, [probe], drawing, f"judged: {probe.name}")
    return Share.of(seen, probe.name)


def spaced(steps: int, looks: int) -> tuple[int, ...]:
    """The steps after which to look: the last one, half of it, a quarter, ..., ``looks`` in all at most.

    >>> spaced(60, 4)
    (7, 15, 30, 60)
    """
    return tuple(sorted({steps // 2**look for look in range(looks)} - {0}))


def back_after(course: Course, drawn_before: float) -> int | None:
    """The first number of steps after which the target is back; None if none is.

    >>> back_after([(0, Share.of("ba", "a")), (5, Share.of("aa", "a"))], 1.0)
    0

    Args:
        course: the shares by steps.
        drawn_before: the share that its prompts alone drew before the erasure.
    """
    return next((step for step, share in course if share.value and share.value >= BACK * drawn_before), None)
