"""The runs of the erasure experiment: which erasures are made and how each is judged.

Suites: "concepts" (every target, towards the superclass and towards another class; one digit with every divergence),
"sigma" (short runs without preservation, where sigma decides whether the divergence matters), "several" (two concepts,
at once or one after the other), "objectives", "variational", "ways" (weightings, timesteps, gradient surgery, frozen
batches) and "methods" (which weights are trained).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

import fdu
from fdu.comparison.runs import weights
from fdu.comparison.sweep import Job, Record, settings_identity
from fdu.config import PLACES
from fdu.evaluation import JUDGED_SEED, Draws, Probe
from fdu.storage.merging import merge
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.digits.vocabulary import DIGITS, INKS

BASELINE = "before"
"""The record of the pipeline as it ships."""
ROLES = ("target", "unseen", "retained", "cross_domain")
DRAW: dict[str, Any] = {"seed": JUDGED_SEED, "num_inference_steps": 12, "guidance_scale": 3.0}
"""No training uses these seeds."""
IMAGES, IMAGES_OF_TARGET = 32, 96
"""Images per class; and of the target and its unseen phrasings towards the superclass, where 32 images could hide one
in ten behind chance."""
SEEDS = (0, 1, 2)
SEEDED = ("three", "seven", "red")
"""The targets that the suite "concepts" runs with all seeds."""
DIVERGENCES = ("mse", "kl", "squared_hellinger", "jensen_shannon", "alpha:0.3", "pearson_chi2")
SIGMA_DIVERGENCES = ("squared_hellinger", "mse", "pearson_chi2")
SIGMA_SETTINGS: dict[str, dict[str, Any]] = {
    "1": {"sigma": 1.0},
    "auto, s0 = 1": {"sigma": "auto", "s0": 1.0},
    "auto, s0 = 10": {"sigma": "auto", "s0": 10.0},
}
SHORT = {"max_train_steps": 40, "preservation_weight": 0.0}
GAMES = tuple({"variational": True, "divergence": name} for name in ("jensen_shannon", "kl", "squared_hellinger"))
CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "objectives": ({"objective": "noise"}, {"negative_guidance": 1.0}),
    "variational": GAMES,
    "methods": (
        {"train_method": "dora"},
        {"train_method": "cross_attention", "learning_rate": 1e-3},
        {"train_method": "attention", "learning_rate": 5e-4},
        {"train_method": "full", "learning_rate": 2e-4},
        {"train_method": "text_encoder", "learning_rate": 5e-4},
        {"train_method": "token", "learning_rate": 0.2},
    ),
    "ways": (
        {"weighting": "posterior"},
        {"weighting": "min_snr"},
        {"weighting": "p2"},
        {"timestep_sampling": "importance"},
        {"gradient_surgery": True},
        {"frozen_batches": 40},
    ),
}
"""Changes of the default settings, by suite; all seeds."""
PATIENT: dict[str, tuple[dict[str, Any], ...]] = {
    "objectives": ({"objective": "noise", "max_train_steps": 240, "train_batch_size": 32},),
    "variational": tuple({**game, "max_train_steps": 240} for game in GAMES),
}
"""Longer runs towards the superclass, where noise as the target, or a critic that learns too, needs more samples."""
BOTH = {"three": "eight", "red": "black"}
"""Two concepts of different kinds and their anchors, in the order of erasure."""
ORDERS = ("at_once", "in_sequence", "merged")
"""Together; the second with the first one's adapter in place; or the second with that merged into the weights."""


@dataclasses.dataclass(frozen=True)
class OneConcept:
    """One concept erased and judged."""

    suite: str
    target: str
    anchor: str
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()
    roles: tuple[str, ...] = ROLES
    images_of_target: int = IMAGES_OF_TARGET

    @property
    def pairs(self) -> dict[str, str]:
        """Targets and their anchors."""
        return {self.target: self.anchor}

    def make(self, cache: Path) -> Record:
        """Erase, draw and judge."""
        config = dataclasses.replace(config_of(self), cache_dir=str(cache))
        result = fdu.erase(digits.load_pipeline(), *digits.concepts(self.target, self.anchor), config=config)
        probes = [probe for role in self.roles for probe in digits.probes(self.target) if probe.role == role]
        drawn = [draw(result.pipeline, probe, self.images_of_target) for probe in probes]
        return {"figures": {self.target: figures(probes, drawn)}, "sigma": result.sigma, "seconds": result.seconds}


@dataclasses.dataclass(frozen=True)
class TwoConcepts:
    """Both concepts erased from one pipeline, each judged."""

    order: str
    """One of ``ORDERS``."""
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()
    suite: ClassVar[str] = "several"
    pairs: ClassVar[Mapping[str, str]] = BOTH
    roles: ClassVar[tuple[str, ...]] = ROLES
    images_of_target: ClassVar[int] = IMAGES

    def make(self, cache: Path) -> Record:
        """Erase, draw and judge; in a sequence, judge the first concept before the second erasure, too."""
        pipeline = digits.load_pipeline()
        config = dataclasses.replace(config_of(self), cache_dir=str(cache))
        pairs = [digits.concepts(*pair) for pair in BOTH.items()]
        record: Record = {}
        if self.order == "at_once":
            targets, anchors = [target for target, _ in pairs], [without_targets(anchor) for _, anchor in pairs]
            results = [fdu.erase(pipeline, targets, anchors, config=config)]
        else:
            results = [fdu.erase(pipeline, *pairs[0], config=config)]
            record["first_alone"] = share(pipeline, digits.probes(*BOTH)[0])
            if self.order == "merged":
                merge(pipeline)
            results.append(fdu.erase(pipeline, *pairs[1], config=config))
        record["figures"] = {}
        drawn: dict[tuple[str, ...], Tensor] = {}
        for target, other in (tuple(BOTH), tuple(BOTH)[::-1]):
            probes = digits.probes(target, other)
            for probe in probes:
                if probe.prompts not in drawn:
                    drawn[probe.prompts] = draw(pipeline, probe, IMAGES)
            record["figures"][target] = figures(probes, [drawn[probe.prompts] for probe in probes])
        return {**record, "sigma": [result.sigma for result in results], "seconds": sum(r.seconds for r in results)}


AnyRun = OneConcept | TwoConcepts


def config_of(run: AnyRun) -> fdu.EraseConfig:
    """All settings of a run, for each of its erasures."""
    preserved = digits.preserved(*run.pairs)
    return fdu.EraseConfig(**{"preservation_prompts": preserved, **dict(run.settings), "seed": run.seed})


def name_of(run: AnyRun) -> str:
    """The name of a run's record: suite, concepts, settings and seed."""
    what = [run.target, run.anchor] if isinstance(run, OneConcept) else ["-".join(BOTH), run.order]
    words = [*what, *(f"{key}={value}" for key, value in run.settings), f"seed={run.seed}"]
    return f"{run.suite}/{'_'.join(words)}".replace(":", "-").replace(" ", "")


def identity_of(run: AnyRun) -> Record:
    """Everything that a run's figures depend on except versions and device."""
    return {
        "targets": list(run.pairs),
        "anchors": list(run.pairs.values()),
        **({"order": run.order} if isinstance(run, TwoConcepts) else {}),
        "settings": settings_identity(config_of(run), without=PLACES),
        "roles": list(run.roles),
        "images_of_target": run.images_of_target,
        **conditions(),
    }


def conditions() -> Record:
    """What all figures depend on."""
    return {"weights": weights("embedded"), "images_per_class": IMAGES, "draw": DRAW}


def jobs(cache: Path) -> list[Job]:
    """The pipeline as it ships, then all runs."""
    made = [Job(name_of(run), identity_of(run), functools.partial(run.make, cache)) for run in runs()]
    return [Job(BASELINE, conditions(), before, first=True), *made]


def runs() -> list[AnyRun]:
    """All runs, in the order in which they are made."""
    concepts = [
        OneConcept("concepts", target, anchor, seed, roles=ROLES if seed == 0 else ROLES[:3])
        for seed in SEEDS
        for target in ((*DIGITS, *INKS) if seed == 0 else SEEDED)
        for anchor in (digits.SUPERCLASS, other_class(target))
    ]
    sigma = [
        OneConcept("sigma", "three", "eight", seed, tuple({"divergence": name, **scale, **SHORT}.items()), ROLES[::2])
        for seed in SEEDS
        for scale in SIGMA_SETTINGS.values()
        for name in SIGMA_DIVERGENCES
    ]
    divergences = [
        OneConcept("concepts", "three", anchor, seed, (("divergence", divergence),), ROLES[:3])
        for anchor in (other_class("three"), digits.SUPERCLASS)
        for seed in SEEDS
        for divergence in DIVERGENCES
        if divergence != fdu.EraseConfig().divergence
    ]
    several = [TwoConcepts(order, seed) for seed in SEEDS for order in ORDERS]
    changed = [
        OneConcept(suite, "three", anchor, seed, tuple(change.items()), ROLES[:3], images)
        # Only towards the superclass does chance blur what is left of the target, which takes more images.
        for changes, anchor, images in (
            (CHANGES, other_class("three"), IMAGES),
            ({suite: CHANGES[suite] for suite in PATIENT}, digits.SUPERCLASS, IMAGES_OF_TARGET),
            (PATIENT, digits.SUPERCLASS, IMAGES_OF_TARGET),
        )
        for suite in changes
        for seed in SEEDS
        for change in changes[suite]
    ]
    return [*concepts, *sigma, *divergences, *several, *changed]


def other_class(target: str) -> str:
    """The anchor that is another class: the next digit or ink, and "eight" for "three"."""
    kind = DIGITS if target in DIGITS else INKS
    return "eight" if target == "three" else kind[(kind.index(target) + 1) % len(kind)]


def without_targets(anchor: fdu.Concept) -> fdu.Concept:
    """The anchor with every target in its prompts replaced by that target's own anchor.

    The prompts of "three" name inks: as long as "a three in red ink" leads to "an eight in red ink", red is taught.
    """
    names = re.compile(rf"\b({'|'.join(BOTH)})\b")
    return fdu.Concept(anchor.name, tuple(names.sub(lambda found: BOTH[found[0]], prompt) for prompt in anchor.prompts))


def before() -> Record:
    """Judge the pipeline as it ships: every class, and every target's unseen phrasings."""
    pipeline = digits.load_pipeline()
    seen = [probe for probe in digits.probes("three") if probe.role != "unseen"]
    unseen = [probe for target in (*DIGITS, *INKS) for probe in digits.probes(target) if probe.role == "unseen"]
    counted = [{probe.name: share(pipeline, probe) for probe in probes} for probes in (seen, unseen)]
    return {"seen": counted[0], "unseen": counted[1]}


def draw(pipeline: Any, probe: Probe, images_of_target: int = IMAGES) -> Tensor:
    """The judged images of one probe."""
    (images,) = fdu.draw(pipeline, [probe], images_of_target if probe.role in ROLES[:2] else IMAGES, **DRAW).images
    return images


def share(pipeline: Any, probe: Probe) -> float:
    """The share of a probe's images that show it."""
    images = draw(pipeline, probe)
    return probe.judge(images).count(probe.name) / len(images)


def figures(probes: list[Probe], drawn: list[Tensor]) -> Record:
    """What the judge counts in images."""
    return dataclasses.asdict(fdu.evaluate(Draws(drawn), Draws(drawn), probes).after)
