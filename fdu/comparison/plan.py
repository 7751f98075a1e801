"""The runs of a comparison: candidates times targets times seeds, each with a name and its settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import torch

import fdu_kernels as fk
from fdu.concepts import ConceptType, Pair
from fdu.config import SEARCHES, TRAIN_METHODS, WITHOUT_STEPS, EraseConfig, read_divergence, trains
from fdu.evaluation import JUDGED_SEED, Sampling
from fdu.subjects.registry import subject_of
from fdu.subjects.subject import Exam, Subject

KL_BY_ALPHA = {0.0: "reverse_kl", 1.0: "kl"}
"""The limits of the alpha divergence, which has no formula there; read here and nowhere else."""
SHAPE_AT = (0.01, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Distances s at which two profiles are compared. No two shapes in the catalogue agree at all of these points."""
MOST_FROZEN = 256
"""Batches whose frozen outputs runs share at most; longer runs draw their own."""
MOST_RUNS = 10_000
FEWEST_IMAGES = 2
"""Images per class; one image cannot show how much images vary."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The settings of one competitor."""

    divergence: str
    s0: float = 1.0
    others: tuple[tuple[str, Any], ...] = ()
    """Further settings in which candidates differ."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by the names of :class:`fdu.EraseConfig`."""
        return {"divergence": self.divergence, "s0": self.s0, **dict(self.others)}

    @property
    def told(self) -> dict[str, Any]:
        """Those of the settings that have an effect."""
        return self.settings if self.trains else dict(self.others)

    @property
    def variant(self) -> str:
        """The settings besides the divergence, in a few words."""
        others = [name if value is True else f"{name} {value}" for name, value in self.others]
        return ", ".join([f"s0 {self.s0:g}", *others])

    @property
    def trains(self) -> bool:
        """Whether its weights are trained, so that the divergence matters."""
        return trains(dict(self.others).get("train_method", EraseConfig.train_method))

    @property
    def label(self) -> str:
        """The settings in a few words."""
        if not self.trains:
            others = dict(self.others)
            named = [others.pop("train_method"), *(f"{name} {value}" for name, value in others.items())]
            return ", ".join(named)
        return f"{self.divergence} ({self.variant})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing(Sampling):
    """How the judged images are drawn. Image i of a class depends only on its prompt and on ``judged_seed + i``."""

    images_per_class: int = 32
    images_of_target: int = 32
    """Images of the target in the phrasings of training; the unseen phrasings get the same number."""
    judged_seed: int = JUDGED_SEED


@dataclasses.dataclass(frozen=True)
class Run:
    """One erasure to make and to judge."""

    target: str
    anchor: str
    candidate: Candidate
    seed: int

    @property
    def name(self) -> str:
        """The name of its record."""
        settings = {**self.candidate.settings, "s0": f"{self.candidate.s0:g}", "seed": self.seed}
        words = [self.target, self.anchor or "nothing", *(f"{name}={value}" for name, value in settings.items())]
        return "_".join(map(slug, words))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison: its model, concepts, candidates and seeds, and how its images are drawn and judged.

    Raises:
        ValueError: nothing to compare, settings that a run would refuse, or two runs of one name.
    """

    model: str
    """A pipeline's folder, a hub id (org/name), or a pipeline of fdu: "emoji" or "digits"."""
    pairs: tuple[tuple[str, str], ...]
    """Targets and their anchors."""
    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    base: EraseConfig = dataclasses.field(default_factory=EraseConfig)
    """The settings that all runs share."""
    concept_type: ConceptType = "object"
    drawing: Drawing = dataclasses.field(default_factory=Drawing)
    dtype: str = "float32"
    device: str = "cpu"
    prompts: str | None = None
    """The concept set to draw, as :func:`fdu.subjects.concept_sets.concept_set` takes it. None: the set with the
    target's name, otherwise the training prompts. The emoji and digits pipelines have their own."""
    judge: str | None = None
    """The image-text encoder that judges: a folder or hub id. None: the default. The emoji and digits pipelines
    have their own."""
    attacked: bool = False
    """Whether each erased model is also attacked, with the default settings of the attack."""
    quantization: str = "none"
    """Bits of the frozen weights, in training and in what is judged."""
    offload: bool = False
    """Whether the blocks of the denoiser stay on the CPU, which changes no figure."""
    variant: str | None = None
    """The variant of the weights' files."""
    base_lora: tuple[str, ...] = ()
    """LoRA files or folders that are part of the model."""

    def __post_init__(self) -> None:
        for name in ("pairs", "candidates", "seeds"):
            given = getattr(self, name)
            if not given:
                raise ValueError(f"{name} is empty; a comparison needs at least one")
            if len(set(given)) < len(given):
                raise ValueError(f"{name} contains a duplicate: {given!r}; remove it")
        if len({target for target, _ in self.pairs}) < len(self.pairs):
            raise ValueError(f"pairs names a target twice: {self.pairs!r}; compare anchors in separate comparisons")
        if isinstance(self.base.sigma, float | int) and len({one.s0 for one in self.candidates if one.trains}) > 1:
            raise ValueError("s0 has several values but sigma is a number, so s0 has no effect; use sigma 'auto'")
        for name in ("images_per_class", "images_of_target"):
            if getattr(self.drawing, name) < FEWEST_IMAGES:
                raise ValueError(
                    f"{name} must be >= {FEWEST_IMAGES}, since one image cannot show how much images vary, "
                    f"got {getattr(self.drawing, name)}"
                )
        runs = self.runs()
        if len(runs) > MOST_RUNS:
            raise ValueError(f"{len(runs)} runs are more than {MOST_RUNS}; compare fewer divergences, s0 or seeds")
        if len({run.name for run in runs}) < len(runs):
            raise ValueError(
                "two runs would have the same name; use targets and settings that differ in letters or digits"
            )
        for run in runs:
            self.config(run)

    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an unfinished comparison covers all candidates."""
        return [
            Run(target, anchor, candidate, seed)
            for seed in self.seeds
            for target, anchor in self.pairs
            for candidate in self.candidates
        ]

    @property
    def subject(self) -> Subject:
        """The model with its words and judges."""
        return subject_of(self.model)

    @property
    def loading(self) -> tuple[str, str, str, str, bool, str | None, tuple[str, ...]]:
        """Everything that decides which pipeline is loaded, and where."""
        return self.model, self.dtype, self.device, self.quantization, self.offload, self.variant, self.base_lora

    @property
    def varied(self) -> set[str]:
        """Names of the settings in which runs differ."""
        return {"divergence", "s0", "seed", *(name for one in self.candidates for name, _ in one.others)}

    def check_names(self) -> None:
        """Refuse concepts that can be neither erased nor judged, before anything is loaded.

        Raises:
            ValueError: names, a concept set or a judge that do not go with the model.
        """
        if self.judge is not None and self.subject.judges_itself:
            raise ValueError(f"judge: {self.subject.title} has its own; leave it out")
        for target, _ in self.pairs:
            self.exam(target)

    def pair(self, target: str) -> Pair:
        """Target and anchor in the words of the model.

        Raises:
            ValueError: names that the model does not know.
        """
        (pair,) = self.subject.pairs((target,), (dict(self.pairs)[target],), self.concept_type)
        return pair

    def exam(self, target: str) -> Exam:
        """The questions that judge an erasure.

        Raises:
            ValueError: as :meth:`pair`, or a concept set that does not go with the model or the target.
        """
        pair = self.pair(target)
        record = {side: dataclasses.asdict(concept) for side, concept in zip(("target", "anchor"), pair, strict=True)}
        return self.subject.exam(pair[0].name, (), self.prompts, record, self.judge)

    @property
    def origin(self) -> str:
        """Where the prompts come from, with version, in words."""
        return "; ".join(dict.fromkeys(self.exam(target).origin for target, _ in self.pairs))

    def config(self, run: Run) -> EraseConfig:
        """All settings of a run, with the model's own prompts to preserve unless the settings name some.

        Batches are drawn in advance where that changes nothing, so that runs share them.
        """
        settings = {**run.candidate.settings, "seed": run.seed}
        base = self.base
        if not run.candidate.trains:
            used = {*WITHOUT_STEPS, *(SEARCHES if settings.get("adversarial_rounds", base.adversarial_rounds) else ())}
            base = EraseConfig(**{name: getattr(base, name) for name in used})
            settings = {name: value for name, value in settings.items() if name in used}
        if not settings.get("adversarial_rounds", base.adversarial_rounds):
            unused = [field for field in dataclasses.fields(base) if field.name.startswith("adversarial")]
            settings |= {field.name: field.default for field in unused}
        config = dataclasses.replace(base, **settings)
        config = self.subject.with_preserved(config, [(run.target, run.anchor)])
        steps = config.max_train_steps * config.gradient_accumulation_steps
        nothing = config.objective == "noise" and not config.preservation_weight
        nothing |= not TRAIN_METHODS[config.train_method].trains
        # A critic that learns alone at first takes batches of its own for that.
        alone = nothing or config.variational or config.timestep_sampling == "importance"
        alone |= bool(config.adversarial_rounds) and config.adversarial_order == "alternate"
        if config.frozen_batches or alone or steps > MOST_FROZEN:
            return config
        return dataclasses.replace(config, frozen_batches=steps)

    def shared_settings(self) -> dict[str, Any]:
        """The settings that all runs share, with those that depend on the model or on the number of steps."""
        first, *others = [self.config(run).as_dict() for run in self.runs()]
        return {name: value for name, value in first.items() if all(one[name] == value for one in others)}

    def conditions(self) -> dict[str, Any]:
        """Everything besides model and settings that all figures depend on, ready for JSON."""
        drawing = dataclasses.asdict(self.drawing)
        del drawing["batch_size"]
        stored = {} if self.quantization == "none" else {"quantization": self.quantization}
        return {"dtype": self.dtype, **stored, "drawing": drawing, "prompts": self.prompts, "judge": self.judge}


def slug(words: str) -> str:
    """Words as a part of a file's name."""
    return re.sub(r"[^\w.=-]+", "-", words)[:80]


def read_alpha(text: str) -> list[str]:
    """The alpha divergences of "low:high:count", evenly spaced; at 0 and 1 the limits, reverse_kl and kl.

    Raises:
        ValueError: no such grid.
    """
    try:
        lowest, highest, number = text.split(":")
        low, high, count = float(lowest), float(highest), int(number)
        fits = count >= 1 and low <= high and (count == 1) == (low == high)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"alpha must be low:high:count, as in -1:2:7, got {text!r}")
    step = (high - low) / max(count - 1, 1)
    # Rounded, so that the grid meets 0 and 1 where decimals say so.
    values = [round(low + step * index, 9) for index in range(count)]
    return [KL_BY_ALPHA.get(value, f"alpha:{value:g}") for value in values]


def distinct(divergences: Sequence[str], variational: bool = False) -> tuple[list[str], dict[str, str]]:
    """The divergences that train different models, in order; and each of the others with the one it equals.

    Between Gaussians an f-divergence is a function h of one distance, and training divides it by its slope, so only the
    shape of h' matters. A divergence and its reverse share that shape; so do alpha and 1 - alpha, and kl,
    reverse_kl and mse. With a critic, every generator trains a model of its own.

    Raises:
        ValueError: an unknown divergence.
    """
    found: dict[Any, str] = {}
    others: dict[str, str] = {}
    for name in divergences:
        divergence = read_divergence(name)
        shape = str(divergence) if variational else _shape(divergence)
        first = found.setdefault(shape, name)
        if first != name:
            others[name] = first
    return list(dict.fromkeys(found.values())), others


def _shape(divergence: fk.Divergence) -> tuple[float, ...]:
    """The slope of the trained loss at some distances, to 9 digits."""
    slopes = divergence.profile_grad(torch.tensor(SHAPE_AT, dtype=torch.float64)).tolist()
    return tuple(float(f"{slope / slopes[0]:.9e}") for slope in slopes)
