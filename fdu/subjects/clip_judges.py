"""Judges for models without their own classifier: zero-shot classification by an image-text encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdu.evaluation.drawing import Attribute, Judge, Probe
from fdu.evaluation.features import ClipFeatures
from fdu.subjects.concept_sets import ConceptSet

CLIP_NOTES = (
    "The judge is an image-text encoder, zero-shot: an image counts as the class whose name is closest to it. The "
    "target and each neighbour are judged against the anchor, the anchor against the target, and everyday and "
    "unrelated subjects against one another, the anchor and the target. Such a judge makes mistakes, both before and "
    "after the erasure: look at the images, and trust differences more than shares. An image of the target shows the "
    "scene that its prompt asks for if the anchor's prompt of that scene is the closest one; the encoder is weak at "
    "this, so only the drop of that share counts.",
)
"""Notes on results judged by CLIP."""


class ClipJudge:
    """Names the class whose text is closest to the image (Radford et al. 2021, arXiv 2103.00020, zero-shot).

    Args:
        encoder: the image-text encoder.
        classes: names of the classes, which also serve as texts, as in published evaluations.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(self, encoder: ClipFeatures, classes: tuple[str, ...]) -> None:
        self.encoder, self.classes = encoder, tuple(dict.fromkeys(classes))
        if len(self.classes) < 2:
            raise ValueError(f"classes must hold at least two names, got {self.classes}")
        self.texts = torch.nn.functional.normalize(encoder.texts(self.classes), dim=-1)

    def __call__(self, images: Tensor) -> list[str]:
        """The class of each image [N, 3, H, W] in [0, 1]."""
        nearest = (self.encoder(images) @ self.texts.T).argmax(1)
        return [self.classes[place] for place in nearest.tolist()]


def clip_probes(concepts: ConceptSet, encoder: ClipFeatures, of_target: Judge | None = None) -> list[Probe]:
    """The probes of a concept set, judged by an image-text encoder.

    As in published evaluations, target and neighbours are each judged against the anchor ("monet" or "painting"?); the
    share judged as the target is its CLIP accuracy. The anchor is judged against the target. Everyday and unrelated
    subjects are judged against one another, the anchor and the target, since an erasure could turn them into these.

    Where the prompts of target and anchor are pairs ("a painting of a cornfield in the style of monet", "a painting of
    a cornfield"), the target's prompts have the attribute "scene": the anchor's prompt, judged against its others.

    Args:
        concepts: what to draw. Without a name, the anchor is not drawn.
        encoder: the image-text encoder.
        of_target: another judge of the target's images, which returns its name.

    Raises:
        ValueError: neither a name of the anchor nor another judge.
    """
    target, anchor = concepts.target.name, concepts.anchor.name
    if not anchor and of_target is None:
        raise ValueError(
            f"prompts: the anchor of {target!r} has no name, against which CLIP could judge; give a concept set in a "
            ".txt file, or a target_judge"
        )
    others = [*concepts.generic, *concepts.unrelated]
    against_anchor = ClipJudge(encoder, (target, anchor)) if anchor else None
    judge_target = of_target or against_anchor
    assert judge_target is not None
    subjects = ClipJudge(encoder, (*(concept.name for concept in others), *([anchor] if anchor else []), target))
    own: dict[str, Any] = {"seeds": concepts.seeds, "guidance": concepts.guidance}
    prompts, scene = concepts.target.prompts, _scene(concepts, encoder)
    probes = [Probe(target, prompts, "target", judge_target, attributes=scene, **own)]
    if concepts.unseen:
        probes.append(Probe(target, concepts.unseen, "unseen", judge_target))
    for concept in concepts.near:
        judge = ClipJudge(encoder, (concept.name, anchor or target))
        probes.append(Probe(concept.name, concept.prompts, "retained", judge, "near"))
    if against_anchor is not None:
        probes.append(Probe(anchor, concepts.anchor.prompts, "retained", against_anchor, "generic"))
    for concept in concepts.generic:
        probes.append(Probe(concept.name, concept.prompts, "retained", subjects, "generic"))
    for concept in concepts.unrelated:
        probes.append(Probe(concept.name, concept.prompts, "retained", subjects, "unrelated"))
    return probes


def _scene(concepts: ConceptSet, encoder: ClipFeatures) -> tuple[Attribute, ...]:
    """The attribute "scene" of the target's prompts; none unless each has its own of two or more anchor's prompts."""
    scenes = concepts.anchor.prompts
    if len(scenes) != len(concepts.target.prompts) or len(set(scenes)) < max(len(scenes), 2):
        return ()
    return (Attribute("scene", scenes, ClipJudge(encoder, scenes)),)
