"""Relearning: the number of fine-tuning steps on images of the target that restore it.

The attack learns from the same :class:`Lesson`. Both use the training loop of the erasure.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fdu.config import TRAIN_METHODS, Count, EraseConfig, Positive, check_choice, check_fields, check_number
from fdu.evaluation.drawing import JudgedSampling, Probe, seen_by_judge
from fdu.evaluation.intervals import Share
from fdu.models.denoiser import Denoiser, call_default
from fdu.models.offloading import offloads
from fdu.training.methods import Request, Trainable, attach
from fdu.training.process_state import own_accelerator, seeded
from fdu.training.reconstruction import AUTOCAST, learn_images

LEARNT_SEED = 3000
"""Offset of the seeds of the target's images that attack and relearning learn from; none of these is judged."""
BACK = 0.5
"""The target is back once its share reaches this fraction of its share before the erasure."""
Course = list[tuple[int, Share]]
"""Steps, and the share of images that show the target after them."""


@dataclasses.dataclass(frozen=True)
class RelearningConfig:
    """Settings of the fine-tuning."""

    train_method: str = "lora"
    """What is trained, as in an erasure."""
    rank: Count = 16
    """Rank of LoRA and DoRA."""
    steps: Count = 80
    """Optimizer steps at most."""
    learning_rate: Positive = 1e-3
    """Learning rate of AdamW, > 0, constant."""
    batch_size: Count = 16
    """Noised images per step, >= 1."""
    looks: Count = 6
    """How often the pipeline is judged on the way, the steps doubling from look to look."""

    def __post_init__(self) -> None:
        check_choice("train_method", self.train_method, [name for name, one in TRAIN_METHODS.items() if one.trains])
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class InversionConfig:
    """Settings of the attack "inversion"."""

    steps: Count = 80
    """Optimizer steps."""
    learning_rate: Positive = 0.05
    """Learning rate of AdamW, > 0, constant."""
    batch_size: Count = 16
    """Noised images per step, >= 1; no more than are drawn at a time."""
    looks: Count = 1
    """How often the pipeline is judged on the way."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class RelearningFigures:
    """How far fine-tuning brought the target back."""

    course: Course
    """The course from step 0."""
    back_after: int | None
    """The steps after which half of ``drawn_before`` is reached; None for never."""
    images: int
    """How many images of the target it learnt from."""
    config: RelearningConfig
    drawn_before: float = 1.0
    """The share of images that showed the target before the erasure."""

    def __post_init__(self) -> None:
        if not self.course:
            raise ValueError("course must start at step 0")


@dataclasses.dataclass(frozen=True)
class AttackOutcome:
    """What an attack with words or images reached."""

    before: Share
    """The share of images of the target's prompts that show it without the attack."""
    after: Share
    """The same under the attack."""
    control: Share
    """The same with random words in place of those found (words, direction), with the name's embeddings moved at random
    by as much (inversion), without a prompt (partial_noise), or of the given part alone (inpainting)."""
    config: dict[str, Any]
    examples: tuple[str, ...] = ()
    """Some of the prompts that were found."""


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Images of the target that a pipeline learns from, and how it is judged on the way."""

    denoiser: Denoiser
    """The pipeline's denoiser, erased or not."""
    probe: Probe
    """The target's prompts, and who judges the images."""
    latents: Tensor
    """Clean latents [M, C, H, W] of the target, as returned by :func:`target_latents`; latent i shows prompt i, modulo
    their number."""
    drawing: JudgedSampling = dataclasses.field(default_factory=JudgedSampling)
    """How judged images are drawn."""
    drawn_before: float = 1.0
    """The share that the target's prompts alone drew before the erasure, half of which counts as back."""
    looks: list[tuple[bool, ...]] = dataclasses.field(default_factory=list)
    """Of each look so far, by image, whether it showed the target."""

    def judged(self) -> Share:
        """Look at the pipeline: the share of images that show the target now."""
        (seen,) = seen_by_judge(self.denoiser, [self.probe], self.drawing, f"judged: {self.probe.name}")
        self.looks.append(tuple(name == self.probe.name for name in seen))
        return Share.of(seen, self.probe.name)

    def learn(self, trainable: Trainable, config: Any, course: Course, seed: int, description: str) -> list[float]:
        """Minimise the squared error of the denoiser on noised latents, by AdamW at a constant rate.

        Args:
            trainable: what is trained.
            config: has ``steps``, ``learning_rate``, ``batch_size``, and ``looks``: how often the pipeline is judged.
            course: gets the steps at which the pipeline is judged, and the shares.
            seed: the seed of timesteps and noise.
            description: label of the progress bar.

        Returns:
            The loss of every step: the mean squared error of the denoiser's output.
        """
        denoiser, asked = self.denoiser, self.probe.prompts
        texts = tuple(dict.fromkeys(asked))
        precision = AUTOCAST.get(denoiser.dtype, "bf16")
        # The last step, half of it, a quarter, ...
        looks = tuple(sorted({config.steps // 2**look for look in range(config.looks)} - {0}))
        with own_accelerator(EraseConfig(mixed_precision=precision), denoiser.device) as accelerator:
            return learn_images(
                accelerator,
                denoiser,
                trainable,
                texts,
                denoiser.encode(texts),
                self.latents,
                torch.tensor([texts.index(asked[place % len(asked)]) for place in range(len(self.latents))]),
                description,
                looks,
                lambda step: course.append((step, self.judged())),
                max_train_steps=config.steps,
                train_batch_size=min(config.batch_size, self.drawing.batch_size),
                learning_rate=config.learning_rate,
                mixed_precision=precision,
                gradient_checkpointing=offloads(denoiser.module),
                seed=seed,
            )


def relearn(lesson: Lesson, config: RelearningConfig | None = None) -> RelearningFigures:
    """Fine-tune a pipeline on images of the target, judge it on the way, and undo it all: the pipeline is as before."""
    config, seed, denoiser = config or RelearningConfig(), lesson.drawing.seed, lesson.denoiser
    course: Course = [(0, lesson.judged())]
    request = Request(config.train_method, config.rank, config.rank, [lesson.probe.name], lesson.probe.prompts)
    with seeded(seed, denoiser.device):
        trainable = attach(denoiser, request)
    try:
        lesson.learn(trainable, config, course, seed, "relearn")
    finally:
        trainable.remove()
    known = lesson.drawn_before
    return RelearningFigures(course, back_after(course, known), len(lesson.latents), config, known)


def invert(lesson: Lesson, config: InversionConfig | None = None, name: str = "") -> AttackOutcome:
    """Train the embedding of a name's own tokens alone until it draws the target again, and undo it: the textual
    inversion of Pham et al. (2023, arXiv 2308.01508), which begins at a name.

    The control moves these embeddings by noise of the same size.

    Args:
        lesson: images of the target, and prompts that contain the name.
        config: the settings.
        name: the name; by default that of the target.
    """
    config, seed, denoiser = config or InversionConfig(), lesson.drawing.seed, lesson.denoiser
    before = lesson.judged()
    request = Request("token", 1, 1.0, [name or lesson.probe.name], lesson.probe.prompts)
    with seeded(seed, denoiser.device):
        trainable = attach(denoiser, request)
    try:
        course: Course = []
        lesson.learn(trainable, config, course, seed, "invert")
        after = course[-1][1]
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for rows in trainable.named_parameters().values():
                noise = torch.randn(rows.shape, generator=generator).to(rows)
                rows.copy_(noise * rows.square().mean().sqrt())
        control = lesson.judged()
    finally:
        trainable.remove()
    return AttackOutcome(before, after, control, dataclasses.asdict(config))


def back_after(course: Course, drawn_before: float) -> int | None:
    """The first number of steps after which the target is back, given the share before the erasure; None for never.

    >>> back_after([(0, Share.of("ba", "a")), (5, Share.of("aa", "a"))], 1.0)
    0
    """
    return next((step for step, share in course if share.value and share.value >= BACK * drawn_before), None)


def target_latents(denoiser: Denoiser, probe: Probe, number: int = 32, drawing: JudgedSampling | None = None) -> Tensor:
    """Clean latents [number, C, H, W] of the target, drawn by a pipeline that still knows it.

    Latent i is of prompt i, modulo their number. For images of your own, take ``denoiser.encode_images``.

    Raises:
        ValueError: number < 1.
    """
    check_number("latents", number, Count)
    drawing, empty = drawing or JudgedSampling(), len(probe.prompts)
    conditioning = denoiser.encode([*probe.prompts, ""])
    chosen = [index % empty for index in range(number)]
    seeds = [drawing.seed + LEARNT_SEED + index for index in range(number)]
    steps: int = drawing.num_inference_steps or call_default(denoiser.pipeline, "num_inference_steps")
    guidance = drawing.guidance_scale
    if guidance is None:
        guidance = call_default(denoiser.pipeline, denoiser.guidance_argument)
    return denoiser.draw_latents(conditioning, chosen, empty, steps, guidance, seeds, drawing.batch_size)
