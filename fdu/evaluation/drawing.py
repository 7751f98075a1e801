"""Probes, the prompts that judge an erasure, and their images, drawn so that two pipelines can be compared."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from fdu.config import Count, Natural, NotNegative, check_fields, check_number, image_size, sides
from fdu.models.denoiser import pictures, silent
from fdu.models.families import guidance_arguments
from fdu.models.offloading import drawable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fdu.models.denoiser import Denoiser

Judge = Callable[[Tensor], list[str]]
"""Maps images [N, 3, H, W] in [0, 1] to the name of the class that each shows."""
Role = Literal["target", "unseen", "retained", "cross_domain"]
"""An erased concept; the same in phrasings that the training never used; a class to retain; one of another kind."""
Group = Literal["near", "generic", "unrelated"]
"""Groups of retained classes: neighbours of the target (hard negatives), the anchor, superclasses and everyday subjects
(which show whether an erasure reaches too far), and unrelated subjects."""
Drawing = tuple[str, int, "float | None"]
"""Prompt, seed and guidance scale of an image."""
JUDGED_SEED = 1000
"""Offset of the judged images' seeds from the seed of the training, whose own images start at that seed."""


@dataclasses.dataclass(frozen=True)
class Attribute:
    """What else prompts ask for besides the class, and the judge that recognises it."""

    name: str
    """In words: "style", "background", "ink"."""
    wanted: tuple[str, ...]
    """The value that each prompt of the probe names, as the judge returns it; "" where the prompt names none."""
    judge: Judge

    def found(self, images: Tensor) -> tuple[bool | None, ...]:
        """Whether the judge sees the wanted value in each image of the probe; None where the prompt names none.

        Args:
            images: [N, 3, H, W] in [0, 1], in the order of :func:`draw`: image i uses prompt i modulo their number.
        """
        wanted = [self.wanted[index % len(self.wanted)] for index in range(len(images))]
        seen = self.judge(images) if any(wanted) else wanted
        return tuple(one == value if value else None for one, value in zip(seen, wanted, strict=True))


@dataclasses.dataclass(frozen=True)
class Probe:
    """Prompts for one class, and the judge that recognises it.

    Raises:
        ValueError: no prompts, two attributes of one name, or attributes, seeds or scales that do not hold one value
            per prompt.
    """

    name: str
    """Name of the class, as the judge returns it and as an image-text encoder reads it."""
    prompts: tuple[str, ...]
    """Prompts of the class, used in turn."""
    role: Role
    judge: Judge
    group: Group = "near"
    """Group of a retained class; ignored for other roles."""
    attributes: tuple[Attribute, ...] = ()
    """What else the prompts ask for; counted for the target and its unseen phrasings, ignored for other roles."""
    seeds: tuple[int, ...] = ()
    """The seed of each prompt's first image, instead of :func:`draw`'s; its next image has the next seed."""
    guidance: tuple[float, ...] = ()
    """The guidance scale of each prompt, instead of :func:`draw`'s."""

    def drawing(self, index: int, seed: int, guidance_scale: float | None) -> Drawing:
        """How image ``index`` is drawn; ``seed`` and ``guidance_scale`` count where the probe has none of its own."""
        turn, place = divmod(index, len(self.prompts))
        own_seed = self.seeds[place] + turn if self.seeds else seed + index
        return self.prompts[place], own_seed, self.guidance[place] if self.guidance else guidance_scale

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"probes: the class {self.name!r} has no prompts; give it at least one")
        names = [one.name for one in self.attributes]
        if len(set(names)) < len(names):
            raise ValueError(f"probes: the class {self.name!r} has two attributes of one name, got {names}; rename one")
        for name in ("seeds", "guidance"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.prompts):
                raise ValueError(
                    f"probes: {name} of the class {self.name!r} must hold one value for each of its "
                    f"{len(self.prompts)} prompts, got {len(getattr(self, name))}"
                )
        for one in self.attributes:
            if len(one.wanted) != len(self.prompts):
                raise ValueError(
                    f"probes: the attribute {one.name!r} of the class {self.name!r} must hold one value for each of "
                    f'its {len(self.prompts)} prompts ("" where a prompt names none), got {len(one.wanted)}'
                )


def groups(probes: Sequence[Probe]) -> dict[str, list[int]]:
    """Indices of the probes by role, and of the retained ones also by group.

    >>> groups([Probe("cat", ("a cat",), "target", list), Probe("lynx", ("a lynx",), "retained", list)])
    {'target': [0], 'retained': [1], 'near': [1]}
    """
    found: dict[str, list[int]] = {}
    for place, probe in enumerate(probes):
        found.setdefault(probe.role, []).append(place)
        if probe.role == "retained":
            found.setdefault(probe.group, []).append(place)
    return found


def check_probes(probes: Sequence[Probe]) -> None:
    """Refuse probes that cannot judge an erasure.

    Raises:
        ValueError: no target, no retained class, unseen phrasings of another class, or two classes with one name.
    """
    roles = [probe.role for probe in probes]
    if "target" not in roles or "retained" not in roles:
        raise ValueError("probes must hold at least one with role 'target' and at least one with role 'retained'")
    targets = {probe.name for probe in probes if probe.role == "target"}
    foreign = [probe.name for probe in probes if probe.role == "unseen" and probe.name not in targets]
    if foreign:
        raise ValueError(
            f"probes hold unseen phrasings of {foreign[0]!r}, which is not a target; give it that probe too"
        )
    names = [probe.name for probe in probes if probe.role != "unseen"]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"probes name the class {twice[0]!r} twice; give each class one probe")


def joint_probes(lists: Sequence[Sequence[Probe]]) -> list[Probe]:
    """The probes of several targets as one list, for an erasure of all of them: first the targets and their unseen
    phrasings, then every other class once. A class that one target asks to retain counts as retained.

    >>> dog, lynx = Probe("dog", ("a dog",), "target", list), Probe("lynx", ("a lynx",), "retained", list)
    >>> cat, kept = Probe("cat", ("a cat",), "target", list), Probe("dog", ("a dog",), "retained", list)
    >>> [(one.name, one.role) for one in joint_probes([[dog, lynx], [cat, kept, lynx]])]
    [('dog', 'target'), ('cat', 'target'), ('lynx', 'retained')]
    """
    every = [probe for probes in lists for probe in probes]
    erased = [probe for probe in every if probe.role in ("target", "unseen")]
    names = {probe.name for probe in erased}
    others: dict[str, Probe] = {}
    for probe in sorted(every, key=lambda probe: probe.role != "retained"):
        if probe.name not in names:
            others.setdefault(probe.name, probe)
    return [*erased, *others.values()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; the defaults are those of the digits pipeline.

    Raises:
        ValueError: a step count or batch size below 1, or a negative guidance scale.
    """

    num_inference_steps: Count | None = 20
    """Sampling steps per image. None: the pipeline's default."""
    guidance_scale: NotNegative | None = 3.0
    """Classifier-free guidance scale; 0 and 1 turn guidance off. None: the pipeline's default."""
    batch_size: Count = 32
    """Images drawn at a time, >= 1; fewer need less memory."""

    def __post_init__(self) -> None:
        check_fields(self)

    def settings(self) -> dict[str, Any]:
        """The settings as arguments of :func:`draw`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Sampling)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedSampling(Sampling):
    """How the robustness tests draw judged images.

    Raises:
        ValueError: no image, or as :class:`Sampling`.
    """

    images: Count = 32
    """Images whose share is counted."""
    seed: Natural = 0
    """Random seed, >= 0; the images use the seeds from ``seed + JUDGED_SEED`` on."""


@dataclasses.dataclass(frozen=True)
class Draws:
    """The images of each probe, in the order of the probes: one tensor [N, 3, H, W] in [0, 1] per probe."""

    images: list[Tensor]


@torch.no_grad()
def draw(
    pipeline: DiffusionPipeline,
    probes: Sequence[Probe],
    images_per_class: int = 32,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = Sampling.batch_size,
    description: str = "images",
    height: int | None = None,
    width: int | None = None,
) -> Draws:
    """Draw ``images_per_class`` images of each probe, without the safety checker.

    Image i of a probe depends only on its prompt and on ``seed + i``, or on the seed and scale that the probe gives its
    prompt, so two pipelines can be compared image by image.

    Args:
        pipeline: any diffusers text-to-image pipeline, or a text-to-video one, of whose videos the middle frames are
            the images.
        probes: the prompts to draw, one probe per class.
        images_per_class: images per probe, >= 1.
        seed: seed of the first image of each probe.
        num_inference_steps: sampling steps per image, >= 1. None: the pipeline's default.
        guidance_scale: classifier-free guidance scale, >= 0. None: the pipeline's default.
        batch_size: images drawn at a time, >= 1; fewer need less memory.
        description: label of the progress bar.
        height, width: pixels of an image, both or neither. None: the pipeline's default.

    Raises:
        ValueError: no probes, ``images_per_class`` below 1, or as :class:`Sampling`.
    """
    if not probes:
        raise ValueError("probes is empty; give at least the target's")
    check_number("images_per_class", images_per_class, Count)
    Sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    settings = sides(image_size(None, height, width))
    if num_inference_steps is not None:
        settings["num_inference_steps"] = num_inference_steps
    # Batches reach over several probes: with few images of each they would be small, and slow.
    asked = [one.drawing(index, seed, guidance_scale) for one in probes for index in range(images_per_class)]
    images: list[Tensor] = []
    bar = tqdm(total=len(asked), desc=description, unit="image")
    with silent(pipeline), unchecked(pipeline), drawable(pipeline), bar as progress:
        start = 0
        for some in _batches(asked, batch_size):
            output = pipeline(
                prompt=[prompt for prompt, _, _ in some],
                **settings,
                **guidance_arguments(pipeline, some[0][2], len(some)),
                generator=[torch.Generator().manual_seed(own) for _, own, _ in some],
                output_type="pt",
            )
            drawn = pictures(output).float().cpu()
            images = images or [drawn.new_empty(images_per_class, *drawn.shape[1:]) for _ in probes]
            for place, image in enumerate(drawn, start):
                images[place // images_per_class][place % images_per_class] = image
            start += len(some)
            progress.update(len(some))
    return Draws(images)


def _batches(asked: Sequence[Drawing], size: int) -> Iterator[list[Drawing]]:
    """Images by batches of one guidance scale each, as a pipeline takes them."""
    for _, images in itertools.groupby(asked, key=lambda one: one[2]):
        equal = list(images)
        yield from (equal[start : start + size] for start in range(0, len(equal), size))


@contextmanager
def unchecked(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Switch the safety checker off within this context: a judge would count its black images as a change."""
    checker = getattr(pipeline, "safety_checker", None)
    if checker is None:
        yield
        return
    # Set past the pipeline's own setter, which would record None in its config.
    vars(pipeline)["safety_checker"] = None
    try:
        yield
    finally:
        vars(pipeline)["safety_checker"] = checker


class Conditioned:
    """Calls a pipeline with what its denoiser encodes, perturbed or not, instead of the prompts themselves."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Do nothing: every call silences the pipeline by itself."""

    def __call__(self, prompt: Sequence[str], generator: Sequence[torch.Generator], **settings: Any) -> Any:
        """Draw the images of prompts, one generator each, with settings of the pipeline's call."""
        conditioning = self.denoiser.encode(prompt)
        scale = settings.pop("guidance_scale", None)
        images: dict[int, Tensor] = {}
        with silent(self.denoiser.pipeline), unchecked(self.denoiser.pipeline):
            for rows in self.denoiser.together(conditioning):
                places = rows.tolist()
                given = self.denoiser.call_arguments(conditioning[rows])
                given |= guidance_arguments(self.denoiser.pipeline, scale, len(places))
                if given.pop("negative_prompt", None) is not None:
                    # Some pipelines take both prompts in words or neither. This one is not perturbed.
                    empty = type(self.denoiser).encode_batch(self.denoiser, [""] * len(places))
                    given |= self.denoiser.negative_arguments(empty)
                drawn = self.denoiser.pipeline(**given, **settings, generator=[generator[place] for place in places])
                images.update(zip(places, pictures(drawn), strict=True))
        return types.SimpleNamespace(images=torch.stack([images[place] for place in sorted(images)]))


def seen_by_judge(
    denoiser: Denoiser, probes: Sequence[Probe], drawing: JudgedSampling, description: str
) -> list[list[str]]:
    """Each probe's judge's answers for its images, drawn with the denoiser's encoding of the prompts."""
    pipeline: Any = Conditioned(denoiser)
    seed, settings = drawing.seed + JUDGED_SEED, drawing.settings()
    drawn = draw(pipeline, probes, drawing.images, seed, **settings, description=description)
    return [probe.judge(images) for probe, images in zip(probes, drawn.images, strict=True)]
