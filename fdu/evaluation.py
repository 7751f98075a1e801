"""Did it work, and what else broke? Draws before and after with the same seeds, and lets an independent judge count."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

Judge = Callable[[Tensor], list[str]]
"""Images [N, 3, H, W] in [0, 1] -> the name of the class that each one shows."""
JUDGED_SEED = 1000
"""Offset of the seeds of judged images: none that a training used."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Prompts that all ask for one class, and the judge who tells whether it was drawn."""

    name: str
    """The class, as the judge names it."""
    prompts: tuple[str, ...]
    """Phrasings, used in turn."""
    role: Literal["target", "unseen", "retained", "cross_domain"]
    """The erased concept; the same in phrasings that training never saw; its neighbours; concepts of another kind."""
    judge: Judge


@dataclasses.dataclass(frozen=True)
class Draws:
    """The images of every probe, in the probes' order: one tensor [N, 3, H, W] in [0, 1] each."""

    images: list[Tensor]


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the judge counted. Every accuracy is a share of images in [0, 1]."""

    target_accuracy: float
    """Of the target's prompts: the share that still shows the target. Lower is a better erasure."""
    unseen_accuracy: float | None
    """The same for phrasings that training never saw; None if none were drawn."""
    retained_accuracy: float
    """The mean over the retained classes of the share that shows what was asked for."""
    worst_retained_accuracy: float
    """The lowest of these shares."""
    worst_retained_class: str
    """The class it belongs to."""
    cross_domain_accuracy: float | None
    """The mean over classes of another kind (colours, if a digit was erased); None if none were drawn."""
    per_class: dict[str, float]
    """The share of every class, target and retained."""
    target_became: dict[str, float]
    """What the judge saw in the target's images: class -> share, most frequent first."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Figures before and after, on images that share prompts and seeds."""

    before: Figures
    after: Figures
    change: dict[str, float]
    """Mean absolute difference of the images, of pixel range [0, 1], by role."""
    images_per_class: int

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    probes: Sequence[Probe],
    images_per_class: int = 32,
    seed: int = 0,
    num_inference_steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 32,
    description: str = "images",
) -> Draws:
    """Draw ``images_per_class`` images of every probe.

    Image i of a probe depends on its prompt and on ``seed + i`` alone, so two pipelines can be compared image by image.
    """
    if not probes:
        raise ValueError("probes is empty; name at least the target")
    if images_per_class < 1:
        raise ValueError(f"images_per_class must be >= 1, got {images_per_class}")
    images = []
    settings = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(disable=True)
    try:
        with tqdm(total=len(probes) * images_per_class, desc=description, unit="image") as progress:
            for probe in probes:
                drawn = []
                for start in range(0, images_per_class, batch_size):
                    indices = range(start, min(start + batch_size, images_per_class))
                    drawn.append(
                        pipeline(
                            [probe.prompts[index % len(probe.prompts)] for index in indices],
                            num_inference_steps=num_inference_steps,
                            guidance_scale=guidance_scale,
                            generator=[torch.Generator().manual_seed(seed + index) for index in indices],
                            output_type="pt",
                        )
                        .images.float()
                        .cpu()
                    )
                    progress.update(len(indices))
                images.append(torch.cat(drawn))
    finally:
        pipeline._progress_bar_config = settings
    return Draws(images)


def evaluate(
    before: DiffusionPipeline | Draws, after: DiffusionPipeline | Draws, probes: Sequence[Probe], **settings: Any
) -> Evaluation:
    """Compare two pipelines, or what was drawn from them with :func:`draw`, on the same probes.

    Args:
        before, after: pipelines to draw from, with ``settings`` as :func:`draw` takes them, or finished draws.
        probes: what to draw and who judges it; exactly one has the role "target", at least one is "retained".

    Raises:
        ValueError: probes without a target or retained class, or draws that do not belong together.
    """
    roles = [probe.role for probe in probes]
    if roles.count("target") != 1 or "retained" not in roles:
        raise ValueError("probes must hold exactly one with role 'target' and at least one with role 'retained'")
    drawn = [
        given if isinstance(given, Draws) else draw(given, probes, description=name, **settings)
        for name, given in (("before", before), ("after", after))
    ]
    counts = [[len(images) for images in one.images] for one in drawn]
    if counts[0] != counts[1] or len(counts[0]) != len(probes):
        raise ValueError(
            f"before and after must hold the same number of images a probe, got {counts[0]} and {counts[1]}"
        )
    change: dict[str, list[float]] = {}
    for probe, one, other in zip(probes, drawn[0].images, drawn[1].images, strict=True):
        change.setdefault(probe.role, []).append((one - other).abs().mean().item())
    return Evaluation(
        before=_count(drawn[0], probes),
        after=_count(drawn[1], probes),
        change={role: sum(values) / len(values) for role, values in change.items()},
        images_per_class=counts[0][0],
    )


def _count(draws: Draws, probes: Sequence[Probe]) -> Figures:
    shares: dict[str, dict[str, float]] = {}
    became: Mapping[str, float] = {}
    for probe, images in zip(probes, draws.images, strict=True):
        seen = Counter(probe.judge(images))
        shares.setdefault(probe.role, {})[probe.name] = seen[probe.name] / len(images)
        if probe.role == "target":
            became = {name: count / len(images) for name, count in seen.most_common()}
    retained = shares["retained"]
    worst = min(retained, key=lambda name: retained[name])

    def mean(role: str) -> float | None:
        return sum(shares[role].values()) / len(shares[role]) if role in shares else None

    (target_accuracy,) = shares["target"].values()
    return Figures(
        target_accuracy=target_accuracy,
        unseen_accuracy=mean("unseen"),
        retained_accuracy=sum(retained.values()) / len(retained),
        worst_retained_accuracy=retained[worst],
        worst_retained_class=worst,
        cross_domain_accuracy=mean("cross_domain"),
        per_class={**shares["target"], **retained, **shares.get("cross_domain", {})},
        target_became=dict(became),
    )
