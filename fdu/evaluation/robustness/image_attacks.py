"""Attacks with images: the erased model goes on from a noised image of the target, or completes a part of one.

A model that only avoids a concept in its prompts still denoises images of it ("When Are Concepts Erased?", 2025, arXiv
2505.17013).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fdu.config import Positive, check_fields
from fdu.evaluation.drawing import JUDGED_SEED
from fdu.evaluation.intervals import Share
from fdu.evaluation.robustness.relearning import AttackOutcome, Lesson
from fdu.models.denoiser import call_default


@dataclasses.dataclass(frozen=True)
class ImageAttackConfig:
    """Settings of the attacks "partial_noise" and "inpainting"."""

    noise: Positive = 0.7
    """partial_noise: where the image enters the trajectory, in (0, 1]: 1 is pure noise."""
    given: Positive = 0.25
    """inpainting: share of the columns of an image that is given, in (0, 1)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.noise > 1 or self.given >= 1:
            raise ValueError(f"noise must be in (0, 1] and given in (0, 1), got {self.noise!r} and {self.given!r}")


def from_partial_noise(lesson: Lesson, config: ImageAttackConfig | None = None) -> AttackOutcome:
    """Go on from noised images of the target, with its prompts, and as a control without a prompt."""
    config = config or ImageAttackConfig()
    return _outcome(lesson, config, config.noise, None)


def inpainting(lesson: Lesson, config: ImageAttackConfig | None = None) -> AttackOutcome:
    """Complete images of the target of which the left part is given (as RePaint, Lugmayr et al. 2022, without its
    resampling), with its prompts. As a control the rest stays empty: a judge may know the target by the part alone."""
    config = config or ImageAttackConfig()
    width = lesson.latents.shape[-1]
    given = (torch.arange(width) < max(round(config.given * width), 1)).float()
    return _outcome(lesson, config, 1.0, given)


def _outcome(lesson: Lesson, config: ImageAttackConfig, start: float, given: Tensor | None) -> AttackOutcome:
    name, prompts = lesson.probe.name, lesson.probe.prompts
    asked = [prompts[place % len(prompts)] for place in range(lesson.drawing.images)]
    after = lesson.probe.judge(_drawn(lesson, asked, start, given))
    alone = _part(lesson, given) if given is not None else _drawn(lesson, [""] * len(asked), start, None)
    control = lesson.probe.judge(alone)
    return AttackOutcome(lesson.judged(), Share.of(after, name), Share.of(control, name), dataclasses.asdict(config))


@torch.no_grad()
def _part(lesson: Lesson, given: Tensor) -> Tensor:
    """The given columns of the latents alone, beside zeros, as images [N, 3, H, W]."""
    images = []
    for first in range(0, lesson.drawing.images, lesson.drawing.batch_size):
        places = range(first, min(first + lesson.drawing.batch_size, lesson.drawing.images))
        latents, _ = _begun(lesson, places)
        images.append(lesson.denoiser.decode_latents(given.to(latents) * latents).cpu())
    return torch.cat(images)


def _begun(lesson: Lesson, places: range) -> tuple[Tensor, Tensor]:
    """The latents of the target that images of these numbers begin at, and their noise, each [N, C, H, W]."""
    latents = lesson.latents[[place % len(lesson.latents) for place in places]].to(lesson.denoiser.device).float()
    first = lesson.drawing.seed + JUDGED_SEED
    noise = [torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(first + one)) for one in places]
    return latents, torch.stack(noise).to(latents)


@torch.no_grad()
def _drawn(lesson: Lesson, prompts: list[str], start: float, given: Tensor | None) -> Tensor:
    """Images of prompts [N, 3, H, W] in [0, 1], by DDIM (Song et al. 2021) from images of the target.

    Image i begins at latent i, modulo their number.

    Args:
        lesson: the images, and how to draw.
        prompts: one per image.
        start: where on the trajectory they begin, in (0, 1].
        given: which columns of the latents are given at every step, [W]; None for none.
    """
    denoiser, drawing = lesson.denoiser, lesson.drawing
    steps = drawing.num_inference_steps or call_default(denoiser.pipeline, "num_inference_steps")
    guidance = drawing.guidance_scale
    if guidance is None:
        guidance = call_default(denoiser.pipeline, denoiser.guidance_argument)
    guided = denoiser.guided_by_empty and guidance > denoiser.unguided_scale
    guidance += 1 - denoiser.unguided_scale
    last = len(denoiser.signal) - 1
    grid = torch.linspace(round(start * last), 0, steps + 1).round().long()
    images = []
    for first in range(0, len(prompts), drawing.batch_size):
        some = prompts[first : first + drawing.batch_size]
        latents, noise = _begun(lesson, range(first, first + len(some)))
        conditioning = denoiser.encode([*some, *([""] * len(some) if guided else [])])
        noisy = denoiser.add_noise(latents, noise, grid[:1].expand(len(some)).to(denoiser.device))
        if given is not None:
            mask = given.to(latents)
            noisy = mask * noisy + (1 - mask) * noise
        for here, there in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
            indices = torch.full((len(some),), here, device=denoiser.device)
            following = torch.full_like(indices, there)
            both = torch.cat([noisy] * (1 + guided)).to(denoiser.dtype)
            output = denoiser.predict(both, indices.repeat(1 + guided), conditioning).float()
            if guided:
                asked, empty = output.chunk(2)
                output = empty + guidance * (asked - empty)
            clean, left = denoiser.parted(output, noisy, indices)
            noisy = clean if not there else denoiser.add_noise(clean, left, following)
            if given is not None:
                known = latents if not there else denoiser.add_noise(latents, noise, following)
                noisy = mask * known + (1 - mask) * noisy
        images.append(denoiser.decode_latents(noisy).cpu())
    return torch.cat(images)
