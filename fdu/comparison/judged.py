"""What a comparison has to know of a model: its concepts, what to keep of it, and who judges its images."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import Tensor
from torch.nn import functional

from fdu.comparison.plan import Comparison
from fdu.concepts import Pair, concept_pair
from fdu.config import EraseConfig
from fdu.evaluation import Probe
from fdu.evaluation.features import CLIP, ClipFeatures
from fdu.models.loading import is_embedded
from fdu.subjects.clip_judges import clip_probes
from fdu.subjects.concept_sets import ConceptSet, choose_set

SIDE = 64
"""Pixels to which larger images are reduced before the change of retained ones is taken."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one probe's images show. Every list has a value an image."""

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
    """Refuse what can be neither erased nor judged, before anything is loaded.

    Raises:
        ValueError: names or a concept set that do not go with the model.
    """
    for target, anchor in comparison.pairs:
        concepts(comparison, target, anchor)
        drawn(comparison, target)


def concepts(comparison: Comparison, target: str, anchor: str) -> Pair:
    """Target and anchor in the words of the model.

    Raises:
        ValueError: names that the model, or :func:`fdu.concepts.concept_pair`, does not take.
    """
    if is_embedded(comparison.model):
        from fdu.subjects import digits

        return digits.concepts(target, anchor)
    return concept_pair(target, anchor, comparison.concept_type)


def with_preserved(comparison: Comparison, target: str, config: EraseConfig) -> EraseConfig:
    """The settings with the model's own prompts to keep, unless they name some."""
    if not is_embedded(comparison.model):
        return config
    from fdu.subjects import digits

    return digits.with_preserved(config, target)


def drawn(comparison: Comparison, target: str) -> ConceptSet | None:
    """The concept set that is drawn to judge an erasure; None for the embedded pipeline, which has probes of its own.

    Raises:
        ValueError: a set for the embedded pipeline or for another target, or nothing to judge by.
    """
    named = [name for name in ("prompts", "judge") if getattr(comparison, name) is not None]
    if is_embedded(comparison.model):
        if named:
            raise ValueError(f"{named[0]}: the embedded pipeline has its own; leave it out")
        return None
    pair = concepts(comparison, target, dict(comparison.pairs)[target])
    sides = zip(("target", "anchor"), pair, strict=True)
    record = {side: dataclasses.asdict(concept) for side, concept in sides}
    return choose_set(pair[0].name, comparison.prompts, record)


def probes(comparison: Comparison, target: str) -> list[Probe]:
    """What to draw, and who judges it.

    Raises:
        ValueError: of :func:`drawn`.
        OSError: the encoder cannot be loaded.
    """
    found = drawn(comparison, target)
    if found is None:
        from fdu.subjects import digits

        return digits.probes(target)
    return clip_probes(found, _encoder(comparison.judge or CLIP, comparison.device))


@functools.cache
def _encoder(judge: str, device: str) -> ClipFeatures:
    return ClipFeatures.load(judge, device)


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
