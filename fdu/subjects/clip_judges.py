"""Judges for models without their own classifier: zero-shot classification by an image-text encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from fdu.evaluation.drawing import Probe
from fdu.evaluation.features import ClipFeatures
from fdu.subjects.concept_sets import ConceptSet

CLIP_NOTES = (
    "The judge is an image-text encoder, zero-shot: an image counts as the class whose name is closest to it. The "
    "target and each neighbour are judged against the anchor, the anchor against the target, and everyday and "
    "unrelated subjects against one another, the anchor and the target. Such a judge makes mistakes, both before and "
    "after the erasure: look at the images, and trust differences more than shares.",
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


def clip_probes(concepts: ConceptSet, encoder: ClipFeatures) -> list[Probe]:
    """The probes of a concept set, judged by an image-text encoder.

    As in published evaluations, target and neighbours are each judged against the anchor ("monet" or "painting"?); the
    share judged as the target is its CLIP accuracy. The anchor is judged against the target. Everyday and unrelated
    subjects are judged against one another, the anchor and the target, since an erasure could turn them into these.
    """
    target, anchor = concepts.target.name, concepts.anchor.name
    others = [*concepts.generic, *concepts.unrelated]
    against_anchor = ClipJudge(encoder, (target, anchor))
    subjects = ClipJudge(encoder, (*(concept.name for concept in others), anchor, target))
    probes = [Probe(target, concepts.target.prompts, "target", against_anchor)]
    if concepts.unseen:
        probes.append(Probe(target, concepts.unseen, "unseen", against_anchor))
    for concept in concepts.near:
        judge = ClipJudge(encoder, (concept.name, anchor))
        probes.append(Probe(concept.name, concept.prompts, "retained", judge, "near"))
    probes.append(Probe(anchor, concepts.anchor.prompts, "retained", against_anchor, "generic"))
    for concept in concepts.generic:
        probes.append(Probe(concept.name, concept.prompts, "retained", subjects, "generic"))
    for concept in concepts.unrelated:
        probes.append(Probe(concept.name, concept.prompts, "retained", subjects, "unrelated"))
    return probes
