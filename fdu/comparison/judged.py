"""What a comparison needs from a model: its concepts, its preserved prompts and its judges."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.nn import functional

from fdu.comparison.plan import Comparison
from fdu.concepts import Pair
from fdu.config import EraseConfig
from fdu.evaluation import Probe
from fdu.subjects.registry import subject_of
from fdu.subjects.subject import Exam

SIDE = 64
"""Pixels to which larger images are reduced before the change of retained ones is taken."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one probe's images show. Every list has one value per image."""

    role: str
    name: str
    hits: tuple[bool, ...]
    """Whether the judge saw what was asked for."""
    change: tuple[float, ...] | None = None
    """Mean absolute difference to the same image before the erasure, of pixel range [0, 1]."""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: hits as "0110...", changes as "0.0123 0.0045 ...", so that a record stays short."""
        hits = "".join("1" if hit else "0" for hit in self.hits)
        change = None if self.change is None else " ".join(f"{value:.4f}" for value in self.change)
        return {"role": self.role, "name": self.name, "hits": hits, "change": change}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Judged:
        """What :meth:`as_dict` gave."""
        change = None if saved["change"] is None else tuple(map(float, saved["change"].split()))
        return cls(saved["role"], saved["name"], tuple(hit == "1" for hit in saved["hits"]), change)


def check(comparison: Comparison) -> None:
    """Refuse concepts that can be neither erased nor judged, before anything is loaded.

    Raises:
        ValueError: names, a concept set or a judge that do not go with the model.
    """
    if comparison.judge is not None and subject_of(comparison.model).judges_itself:
        raise ValueError("judge: the embedded pipeline has its own; leave it out")
    for target, anchor in comparison.pairs:
        concepts(comparison, target, anchor)
        exam(comparison, target)


def concepts(comparison: Comparison, target: str, anchor: str) -> Pair:
    """Target and anchor in the words of the model.

    Raises:
        ValueError: names that the model does not know.
    """
    (pair,) = subject_of(comparison.model).pairs((target,), (anchor,), comparison.concept_type)
    return pair


def with_preserved(comparison: Comparison, target: str, config: EraseConfig) -> EraseConfig:
    """The settings with the model's own prompts to preserve, unless they name some."""
    return subject_of(comparison.model).with_preserved(config, (target,))


def exam(comparison: Comparison, target: str) -> Exam:
    """The questions that judge an erasure.

    Raises:
        ValueError: a concept set that does not go with the model or the target, or no prompts to judge by.
    """
    pair = concepts(comparison, target, dict(comparison.pairs)[target])
    record = {side: dataclasses.asdict(concept) for side, concept in zip(("target", "anchor"), pair, strict=True)}
    return subject_of(comparison.model).exam(pair[0].name, (), comparison.prompts, record, comparison.judge)


def probes(comparison: Comparison, target: str) -> list[Probe]:
    """The images to draw, and who judges them.

    Raises:
        ValueError: as :func:`exam`.
        OSError: the encoder cannot be loaded.
    """
    return exam(comparison, target).panel(comparison.device).probes


def judge(probe: Probe, images: Tensor, before: Tensor | None = None) -> Judged:
    """Let the probe's judge look at its images.

    Args:
        probe: what was asked for.
        images: [N, 3, H, W] in [0, 1].
        before: the same images before the erasure, as :func:`small` makes them.
    """
    hits = tuple(name == probe.name for name in probe.judge(images))
    change = None
    if before is not None:
        change = tuple((small(images).float() - before.float()).abs().mean((1, 2, 3)).tolist())
    return Judged(probe.role, probe.name, hits, change)


def small(images: Tensor) -> Tensor:
    """Images as they are kept to be compared: [N, 3, h, w] in float16, h and w at most ``SIDE``."""
    height, width = images.shape[-2:]
    if max(height, width) > SIDE:
        scale = SIDE / max(height, width)
        images = functional.interpolate(images, (round(height * scale), round(width * scale)), mode="area")
    return images.half()
