"""What the tests of robustness have in common: images of the target to learn from, and images to be judged."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from fdu.denoisers import Denoiser
from fdu.evaluation import JUDGED_SEED, Probe, draw
from fdu.robustness.shares import Share

LEARNT_SEED = 3000
"""Offset of the seeds of the target's images that attack and relearning learn from: none that are judged."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How judged images are drawn."""

    images: int = 32
    """Images whose share is counted."""
    num_inference_steps: int = 20
    """Steps of the scheduler an image."""
    guidance_scale: float = 3.0
    """Classifier-free guidance."""
    seed: int = 0
    """Of everything random; the images begin with ``seed + JUDGED_SEED``."""
    batch_size: int = 32
    """Images drawn at a time."""

    def __post_init__(self) -> None:
        for name in ("images", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")


def target_latents(denoiser: Denoiser, probe: Probe, number: int = 32, drawing: Drawing | None = None) -> Tensor:
    """Clean latents [number, C, H, W] of the target, drawn by a pipeline that still knows it.

    Latent i is of prompt i, modulo their number. For images of your own, take ``denoiser.encode_images``.

    Raises:
        ValueError: number < 1.
    """
    if number < 1:
        raise ValueError(f"number of latents must be >= 1, got {number}")
    drawing = drawing or Drawing()
    prompts = [probe.prompts[index % len(probe.prompts)] for index in range(number)]
    seeds = [drawing.seed + LEARNT_SEED + index for index in range(number)]
    steps, guidance = drawing.num_inference_steps, drawing.guidance_scale
    return denoiser.draw_latents(prompts, steps, guidance, seeds, drawing.batch_size)


def count(pipeline: Any, probe: Probe, drawing: Drawing) -> Share:
    """The share of images of the probe's prompts that show what they ask for, by the probe's judge."""
    images = draw(
        pipeline,
        [probe],
        drawing.images,
        drawing.seed + JUDGED_SEED,
        drawing.num_inference_steps,
        drawing.guidance_scale,
        drawing.batch_size,
        description=f"judged: {probe.name}",
    ).images[0]
    return Share.of(probe.judge(images), probe.name)


def spaced(steps: int, looks: int) -> tuple[int, ...]:
    """The steps after which to look: the last one, half of it, a quarter, ..., ``looks`` in all at most.

    >>> spaced(60, 4)
    (7, 15, 30, 60)
    """
    return tuple(sorted({steps // 2**look for look in range(looks)} - {0}))
