"""The digits pipeline: a real latent text-to-image pipeline of handwritten digits in coloured ink, and its judge.

An ordinary diffusers ``StableDiffusionPipeline`` folder of 3 MB, trained from scratch by ``train.py`` on scikit-learn's
handwritten digits, for demonstrations, tests and studies that run anywhere in a minute.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from fdu.concepts import Concept
from fdu.config import closest
from fdu.evaluation import Attribute, Judge, Probe
from fdu.evaluation.drawing import Role
from fdu.evaluation.features import ModuleFeatures
from fdu.subjects.digits.handwriting import strength
from fdu.subjects.digits.vocabulary import (
    DIGIT_NOUNS,
    DIGITS,
    FRAMES,
    GENERIC_NOUNS,
    INKS,
    MEDIA,
    NAMES,
    UNNAMED_INK,
    medium_phrases,
    prompt,
)
from fdu.subjects.from_scratch import convolutions

DATA = Path(__file__).parent / "data"
PIPELINE_FOLDER, CLASSIFIER_FILE = DATA / "pipeline", "classifier.safetensors"

SUPERCLASS = "digit"
"""The anchor that names no digit and no ink."""
SEEN_FRAMES, UNSEEN_FRAMES = FRAMES[:4], FRAMES[4:]
SEEN_NOUNS, UNSEEN_NOUNS = DIGIT_NOUNS[:3], DIGIT_NOUNS[3:]
SUPERCLASS_NOUNS = GENERIC_NOUNS[:3]
"""Phrasings that erasures train on, others of the vocabulary that they never see, and the superclass's own."""


NOTES = (
    "The images come from the digits pipeline of fdu, trained from scratch on scikit-learn's handwritten digits (E. "
    "Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, CC BY 4.0), "
    "drawn in one of four ink colours. The judge is a classifier trained only on the real digits.",
    "The text embeddings of this small pipeline separate concepts far better than those of a real CLIP, so erasing one "
    "harms its neighbours less than in Stable Diffusion. These figures demonstrate the method and check the "
    "installation; they do not measure the effect on a large model.",
)
"""Notes on results from the digits pipeline."""
JUDGE = "digits classifier"
JUDGE_LAYERS = ("digit.3", "digit.7", "digit.11", "medium.3", "medium.7")
"""Submodules of the classifier: the outputs of its convolutional blocks."""
JUDGE_FEATURES = ("digit.12", "medium.9")
"""The inputs of its last layers: the flattened outputs of the blocks."""


class DigitClassifier(nn.Module):
    """The judge: one small convolutional network reads the shape of the ink without its colour, one the colours."""

    def __init__(self) -> None:
        super().__init__()
        self.digit = nn.Sequential(
            *convolutions((1, 24, 48, 64)), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, len(DIGITS))
        )
        self.medium = nn.Sequential(
            *convolutions((3, 12, 24)), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, len(MEDIA))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits over digits [N, 10] and over media [N, 5] of images [N, 3, 32, 32] in [0, 1]."""
        return self.digit(strength(images)), self.medium(images)


def load_pipeline(dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The pipeline, on the CPU."""
    return StableDiffusionPipeline.from_pretrained(PIPELINE_FOLDER, dtype=dtype)


def load_classifier(folder: Path = DATA) -> DigitClassifier:
    """The judge, which learnt from real digits and never saw the pipeline."""
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(folder / CLASSIFIER_FILE))
    return classifier.eval().requires_grad_(False)


@functools.cache
def judges() -> dict[str, Judge]:
    """The judge of "digit" and the judge of "medium"."""
    classifier = load_classifier()

    def judge(output: int, names: Sequence[str]) -> Judge:
        return lambda images: [names[index] for index in classifier(images)[output].argmax(1)]

    return {"digit": judge(0, DIGITS), "medium": judge(1, MEDIA)}


def features() -> ModuleFeatures:
    """The judge's penultimate features, of shape and colour, with the outputs of its convolutional blocks as layers."""
    return ModuleFeatures(load_classifier(), JUDGE_LAYERS, JUDGE_FEATURES, JUDGE, 256)


def kind_of(target: str) -> str:
    """The type of concept for the packaged phrasings."""
    return "digit" if target in DIGITS else "ink"


def concepts(target: str, anchor: str) -> tuple[Concept, Concept]:
    """Target and anchor in the words of the pipeline, prompts aligned.

    Args:
        target: a digit ("three") or an ink ("red").
        anchor: another digit or ink, or "digit": the superclass, which names neither digit nor ink.

    Raises:
        ValueError: a name the pipeline does not know, or an anchor that does not go with the target.
    """
    check_target(target)
    kind = DIGITS if target in DIGITS else INKS
    if anchor != SUPERCLASS and anchor not in kind:
        hint = closest(anchor, (SUPERCLASS, *kind))
        raise ValueError(f"anchor must be {SUPERCLASS!r} or one of {', '.join(kind)}, got {anchor!r}{hint}")
    if anchor == target:
        raise ValueError(f"target and anchor are the same, {target!r}; choose another anchor, such as {SUPERCLASS!r}")
    return Concept(target, _prompts(target, target)), Concept(anchor, _prompts(target, anchor))


def chance(target: str, anchor: str) -> float:
    """The share of images for the anchor that show the target by chance."""
    if anchor != SUPERCLASS:
        return 0.0
    return 1 / len(DIGITS) if target in DIGITS else UNNAMED_INK


def check_target(target: str) -> None:
    """Refuse a target that the pipeline does not know.

    Raises:
        ValueError: neither a digit nor an ink.
    """
    if target not in NAMES:
        names = f"a digit ({', '.join(DIGITS)}) or an ink ({', '.join(INKS)})"
        raise ValueError(f"target must be {names}, got {target!r}{closest(target, NAMES)}")


def preserved(*targets: str, anchors: Sequence[str] = ()) -> tuple[str, ...]:
    """Prompts to keep when ``targets`` are erased: the superclass, and the neighbours of the targets' own kinds,
    which include the anchors."""
    digits = [digit for digit in DIGITS if digit not in targets]
    media = [medium for medium in MEDIA if medium not in targets]
    neighbours = []
    if len(digits) < len(DIGITS):
        neighbours += [prompt(SEEN_NOUNS[1].format(digit)) for digit in digits]
    if len(media) < len(MEDIA):
        phrases = [medium_phrases(medium)[0] for medium in media]
        nouns = [SEEN_NOUNS[1].format(digit) for digit in digits]
        neighbours += [prompt(noun, medium_phrase=phrase) for noun in nouns for phrase in phrases]
    return tuple(dict.fromkeys((*(prompt(noun) for noun in SUPERCLASS_NOUNS), *neighbours)))


def probes(target: str, *others: str, anchor: str = "") -> list[Probe]:
    """The classes to draw to judge the erasure of ``target``: itself, seen and unseen, its kind, and the other kind.

    The attribute of a digit's prompts is the ink that they name, that of an ink's prompts the digit. ``others`` were
    erased as well, and are neither to be retained nor lost. The anchor is of the target's kind.
    """
    judge = judges()
    digit_erased = target in DIGITS
    kinds = {"digit": DIGITS, "medium": INKS}
    own, other = ("digit", "medium") if digit_erased else ("medium", "digit")
    retained = [name for name in kinds[own] if name not in (target, *others)]
    cross_domain = [name for name in kinds[other] if name not in others]

    def asking(prompts: tuple[str, ...], role: Role) -> Probe:
        wanted = tuple(next((name for name in cross_domain if name in text.split()), "") for text in prompts)
        attribute = Attribute("ink" if digit_erased else "digit", wanted, judge[other])
        return Probe(target, prompts, role, judge[own], attributes=(attribute,))

    return [
        asking(_prompts(target, target), "target"),
        asking(_unseen_prompts(target), "unseen"),
        *(Probe(name, _prompts(name, name), "retained", judge[own]) for name in retained),
        *(Probe(name, _prompts(name, name), "cross_domain", judge[other]) for name in cross_domain),
    ]


def _prompts(target: str, name: str) -> tuple[str, ...]:
    """The seen phrasings of ``target``, with ``name`` in its place."""
    if target in DIGITS:
        nouns = SUPERCLASS_NOUNS if name == SUPERCLASS else tuple(noun.format(name) for noun in SEEN_NOUNS)
        phrases = ("", *(medium_phrases(ink)[0] for ink in INKS))
    else:
        nouns = ("a digit", *(SEEN_NOUNS[2].format(digit) for digit in DIGITS))
        phrases = ("",) if name == SUPERCLASS else medium_phrases(name)[:1]
    return tuple(prompt(noun, frame, phrase) for frame in SEEN_FRAMES for noun in nouns for phrase in phrases)


def _unseen_prompts(target: str) -> tuple[str, ...]:
    """Phrasings of ``target`` that share no frame and no noun, or no ink phrase, with the seen ones."""
    if target in DIGITS:
        nouns = tuple(noun.format(target) for noun in UNSEEN_NOUNS)
        phrases = ("", *(medium_phrases(ink)[1] for ink in INKS))
    else:
        nouns = ("a number", *(UNSEEN_NOUNS[0].format(digit) for digit in DIGITS))
        phrases = medium_phrases(target)[1:]
    return tuple(prompt(noun, frame, phrase) for frame in UNSEEN_FRAMES for noun in nouns for phrase in phrases)
