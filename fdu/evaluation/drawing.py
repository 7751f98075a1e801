"""Draw the images of probes, so that two pipelines can be compared image by image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from fdu.config import Count, NotNegative, check_fields, check_number
from fdu.evaluation.probes import Probe, check_prompts
from fdu.models.denoiser import silent

JUDGED_SEED = 1000
"""Offset of the judged images' seeds from the seed of the training, whose own images start at that seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; the defaults are those of the embedded pipeline.

    Raises:
        ValueError: a step count or batch size below 1, or a negative guidance scale.
    """

    num_inference_steps: Count | None = 20
    """Sampling steps per image. None: the pipeline's default."""
    guidance_scale: NotNegative | None = 3.0
    """Classifier-free guidance scale; 0 and 1 turn guidance off. None: the pipeline's default."""
    batch_size: Count = 32
    """Images drawn at a time, >= 1; fewer need less memory."""

    def __post_init__(self) -> None:
        check_fields(self)

    def settings(self) -> dict[str, Any]:
        """The settings as arguments of :func:`draw`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}


@dataclasses.dataclass(frozen=True)
class Draws:
    """The images of each probe, in the order of the probes: one tensor [N, 3, H, W] in [0, 1] per probe."""

    images: list[Tensor]


@contextmanager
def unchecked(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Switch the safety checker off within this context: a judge would count its black images as a change."""
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None:
        yield
        return
    # Set past the pipeline's own setter, which would record None in its config.
    vars(pipeline)["safety_checker"] = None
    try:
        yield
    finally:
        vars(pipeline)["safety_checker"] = checker


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    probes: Sequence[Probe],
    images_per_class: int = 32,
    seed: int = 0,
    num_inference_steps: int | None = Sampling.num_inference_steps,
    guidance_scale: float | None = Sampling.guidance_scale,
    batch_size: int = Sampling.batch_size,
    description: str = "images",
) -> Draws:
    """Draw ``images_per_class`` images of each probe, without the safety checker.

    Image i of a probe depends only on its prompt and on ``seed + i``, so two pipelines can be compared image by image.

    Args:
        pipeline: any diffusers text-to-image pipeline.
        probes: the prompts to draw, one probe per class.
        images_per_class: images per probe, >= 1.
        seed: seed of the first image of each probe.
        num_inference_steps: sampling steps per image. None: the pipeline's default.
        guidance_scale: classifier-free guidance scale. None: the pipeline's default.
        batch_size: images drawn at a time; fewer need less memory.
        description: label of the progress bar.

    Raises:
        ValueError: no probes, a probe without prompts, ``images_per_class`` below 1, or as :class:`Sampling`.
    """
    if not probes:
        raise ValueError("probes is empty; give at least the target's")
    check_prompts(probes)
    check_number("images_per_class", images_per_class, Count)
    sampling = Sampling(
        num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size
    ).settings()
    chosen = {name: value for name, value in sampling.items() if name != "batch_size" and value is not None}
    images = []
    bar = tqdm(total=len(probes) * images_per_class, desc=description, unit="image")
    with silent(pipeline), unchecked(pipeline), bar as progress:
        for probe in probes:
            drawn = []
            for start in range(0, images_per_class, batch_size):
                indices = range(start, min(start + batch_size, images_per_class))
                drawn.append(
                    pipeline(
                        [probe.prompts[index % len(probe.prompts)] for index in indices],
                        **chosen,
                        generator=[torch.Generator().manual_seed(seed + index) for index in indices],
                        output_type="pt",
                    )
                    .images.float()
                    .cpu()
                )
                progress.update(len(indices))
            images.append(torch.cat(drawn))
    return Draws(images)
