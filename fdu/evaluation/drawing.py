"""Draws the images of probes, so that two pipelines can be compared image by image."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from fdu.evaluation.probes import Probe, check_prompts
from fdu.models.calls import silent

JUDGED_SEED = 1000
"""Offset of the seeds of judged images from the seed of a training, whose own images begin at that seed itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an image is drawn; the defaults are those of the embedded pipeline.

    Raises:
        ValueError: less than one step or image at once, or a negative guidance.
    """

    num_inference_steps: int | None = 20
    """Steps of the scheduler an image; None: the pipeline's own default."""
    guidance_scale: float | None = 3.0
    """Of classifier-free guidance, where 0 and 1 mean none; None: the pipeline's own default."""
    batch_size: int = 32
    """Images drawn at once; fewer take less memory."""

    def __post_init__(self) -> None:
        for name, least in (("num_inference_steps", 1), ("guidance_scale", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

    def settings(self) -> dict[str, Any]:
        """By the names of :func:`draw`'s arguments."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}


@dataclasses.dataclass(frozen=True)
class Draws:
    """The images of every probe, in the probes' order: one tensor [N, 3, H, W] in [0, 1] each."""

    images: list[Tensor]


@contextmanager
def unchecked(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within this context no safety checker blackens what the pipeline draws: a judge would take it for a change."""
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None:
        yield
        return
    # Past the pipeline's own way to set a part, which would note in its config that there is none.
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
    """Draw ``images_per_class`` images of every probe.

    Image i of a probe depends on its prompt and on ``seed + i`` alone, so two pipelines can be compared image by image.
    A safety checker is left out.

    Args:
        pipeline: any diffusers pipeline that draws images from prompts.
        probes: what to draw.
        images_per_class: images of each probe.
        seed: of the first image of each probe.
        num_inference_steps: steps of the scheduler an image; None: the pipeline's own default.
        guidance_scale: of classifier-free guidance; None: the pipeline's own default.
        batch_size: images drawn at once; fewer take less memory.
        description: words beside the progress bar.

    Raises:
        ValueError: no probes, one without prompts, no images, or as :class:`Sampling`.
    """
    if not probes:
        raise ValueError("probes is empty; name at least the target")
    check_prompts(probes)
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be >= 1, got {images_per_class}")
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
