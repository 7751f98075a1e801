"""A white-box attack: optimise a perturbation of the embeddings until the denoiser draws the target again.

Concept inversion (Pham et al. 2023, arXiv 2308.01508) optimises an embedding before the text encoder, and
UnlearnDiffAtk (Zhang et al. 2023, arXiv 2310.11868) tokens per image; both with the erased denoiser's own loss on
images of the target, as here. Here the perturbation comes after the text encoder. It need not be the embedding of any
words, but one serves all prompts and all images. So its success bounds that of the others neither above nor below.
"""

from __future__ import annotations

import dataclasses

import torch

from fdu.config import Count, Positive, check_fields
from fdu.evaluation.intervals import Share
from fdu.evaluation.robustness.relearning import Course, Lesson, back_after
from fdu.training.methods.perturbation import Perturbation

START = 0.5
"""Where restarts begin: noise of this size, in the unit of the perturbation. The first attempt begins at 0."""


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """Settings of the attack."""

    tokens: Count = 4
    """Number of embeddings that the attack may move, from the start of the prompt."""
    steps: Count = 60
    """Optimizer steps of an attempt."""
    learning_rate: Positive = 0.1
    """Learning rate of AdamW, > 0, in units of the embeddings' root mean square."""
    batch_size: Count = 16
    """Noised images per step, >= 1."""
    restarts: Count = 2
    """Attempts; the one with the lowest loss counts."""
    looks: Count = 4
    """How often each attempt is judged on the way, the steps doubling from look to look."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One optimisation from one start."""

    course: Course
    loss: float
    """The denoiser's loss on the target's images at the end, the mean of a quarter of the steps."""
    size: float
    """Root mean square of the perturbation at the end, relative to that of the embeddings."""
    hits: tuple[bool, ...] = ()
    """By image of the last look, whether it showed the target."""


@dataclasses.dataclass(frozen=True)
class AttackFigures:
    """What the attack reached."""

    before: Share
    """The share of images of the target's prompts that show it without an attack."""
    after: Share
    """The same under the attempt with the lowest loss. The judge does not choose, so the interval is valid."""
    attempts: list[Attempt]
    """All of them, in order."""
    chosen: int
    """The index of the attempt that counts."""
    back_after: int | None
    """The steps of that attempt after which half of ``drawn_before`` is reached; 0 without attack, None for never."""
    config: AttackConfig
    drawn_before: float = 1.0
    """The share of images that showed the target before the erasure, without an attack."""

    def __post_init__(self) -> None:
        if not 0 <= self.chosen < len(self.attempts):
            raise ValueError(f"chosen must be one of {len(self.attempts)} attempts, got {self.chosen}")

    def against(self, drawn_before: float) -> AttackFigures:
        """The same with another ``drawn_before``."""
        course = [(0, self.before), *self.attempts[self.chosen].course]
        return dataclasses.replace(self, back_after=back_after(course, drawn_before), drawn_before=drawn_before)


def attack(lesson: Lesson, config: AttackConfig | None = None) -> AttackFigures:
    """Attack a pipeline, and leave it unchanged.

    Raises:
        ValueError: more tokens than the denoiser reads.
    """
    config = config or AttackConfig()
    before = lesson.judged()
    attempts = [_attempt(lesson, config, number) for number in range(config.restarts)]
    chosen = min(range(len(attempts)), key=lambda number: attempts[number].loss)
    course = attempts[chosen].course
    found = AttackFigures(before, course[-1][1], attempts, chosen, None, config)
    return found.against(lesson.drawn_before)


def _attempt(lesson: Lesson, config: AttackConfig, number: int) -> Attempt:
    seed, start = lesson.drawing.seed + number, START if number else 0.0
    generator = torch.Generator().manual_seed(seed)
    perturbation = Perturbation(lesson.denoiser, lesson.probe.prompts[0], config.tokens, start, generator)
    course: Course = []
    try:
        losses = lesson.learn(perturbation, config, course, seed, "attack")
        last = losses[-max(1, len(losses) // 4) :]
        return Attempt(course, sum(last) / len(last), perturbation.size, lesson.looks[-1])
    finally:
        perturbation.remove()
