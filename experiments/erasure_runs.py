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
from pathlib import Path
from typing import Any

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
BOTH = (("three", "eight"), ("red", "black"))
"""Two concepts of different kinds and their anchors, in the order of erasure."""
ORDERS = ("at_once", "in_sequence", "merged")
"""Together; the second with the first one's adapter in place; or the second with that merged into the weights."""


@dataclasses.dataclass(frozen=True)
class Erasure:
    """One run: concepts erased from the pipeline, and each of them judged."""

    suite: str
    pairs: tuple[tuple[str, str], ...]
    """Targets and their anchors."""
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()
    """Those that are not the default."""
    roles: tuple[str, ...] = ROLES
    images_of_target: int = IMAGES_OF_TARGET
    order: str = "at_once"
    """One of ``ORDERS``."""

    @property
    def name(self) -> str:
        """The name of its record: suite, concepts, settings and seed."""
        targets, anchors = zip(*self.pairs, strict=True)
        what = ["-".join(targets), self.order if len(targets) > 1 else anchors[0]]
        words = [*what, *(f"{key}={value}" for key, value in self.settings), f"seed={self.seed}"]
        return f"{self.suite}/{'_'.join(words)}".replace(":", "-").replace(" ", "")

    @property
    def config(self) -> fdu.EraseConfig:
        """All settings, for each of its erasures."""
        preserved = digits.preserved(*dict(self.pairs))
        return fdu.EraseConfig(**{"preservation_prompts": preserved, **dict(self.settings), "seed": self.seed})

    @property
    def identity(self) -> Record:
        """Everything that its figures depend on except versions and device."""
        settings = settings_identity(self.config, without=PLACES)
        return {**dataclasses.asdict(self), "settings": settings, **conditions()}

    def make(self, cache: Path) -> Record:
        """Erase, draw and judge; of two erasures in sequence, judge the first concept before the second, too."""
        pipeline = digits.load_pipeline()
        config = dataclasses.replace(self.config, cache_dir=str(cache))
        pairs = [digits.concepts(*pair) for pair in self.pairs]
        record: Record = {}
        if self.order == "at_once":
            targets, anchors = [target for target, _ in pairs], [without_targets(anchor, self) for _, anchor in pairs]
            results = [fdu.erase(pipeline, targets, anchors, config=config)]
        else:
            results = [fdu.erase(pipeline, *pairs[0], config=config)]
            record["first_alone"] = share(pipeline, digits.probes(*dict(self.pairs))[0])
            if self.order == "merged":
                merge(pipeline)
            results.append(fdu.erase(pipeline, *pairs[1], config=config))
        drawn: dict[tuple[str, ...], Tensor] = {}
        figures = {}
        for target, _ in self.pairs:
            others = [other for other, _ in self.pairs if other != target]
            probes = [probe for probe in digits.probes(target, *others) if probe.role in self.roles]
            for probe in probes:
                if probe.prompts not in drawn:
                    drawn[probe.prompts] = draw(pipeline, probe, self.images_of_target)
            images = Draws([drawn[probe.prompts] for probe in probes])
            figures[target] = dataclasses.asdict(fdu.evaluate(images, images, probes).after)
        sigmas, seconds = [result.sigma for result in results], sum(result.seconds for result in results)
        return {**record, "figures": figures, "sigma": sigmas, "seconds": seconds}


def conditions() -> Record:
    """What all figures depend on."""
    return {"weights": weights("embedded"), "images_per_class": IMAGES, "draw": DRAW}


def jobs(cache: Path) -> list[Job]:
    """The pipeline as it ships, then all runs."""
    made = [Job(run.name, run.identity, functools.partial(run.make, cache)) for run in runs()]
    return [Job(BASELINE, conditions(), before, first=True), *made]


def runs() -> list[Erasure]:
    """All runs, in the order in which they are made."""
    neighbour, superclass = (("three", other_class("three")),), (("three", digits.SUPERCLASS),)
    concepts = [
        Erasure("concepts", ((target, anchor),), seed, roles=ROLES if seed == 0 else ROLES[:3])
        for seed in SEEDS
        for target in ((*DIGITS, *INKS) if seed == 0 else SEEDED)
        for anchor in (digits.SUPERCLASS, other_class(target))
    ]
    sigma = [
        Erasure("sigma", neighbour, seed, tuple({"divergence": name, **scale, **SHORT}.items()), ROLES[::2])
        for seed in SEEDS
        for scale in SIGMA_SETTINGS.values()
        for name in SIGMA_DIVERGENCES
    ]
    divergences = [
        Erasure("concepts", pairs, seed, (("divergence", divergence),), ROLES[:3])
        for pairs in (neighbour, superclass)
        for seed in SEEDS
        for divergence in DIVERGENCES
        if divergence != fdu.EraseConfig().divergence
    ]
    several = [
        Erasure("several", BOTH, seed, images_of_target=IMAGES, order=order) for seed in SEEDS for order in ORDERS
    ]
    changed = [
        Erasure(suite, pairs, seed, tuple(change.items()), ROLES[:3], images)
        # Only towards the superclass does chance blur what is left of the target, which takes more images.
        for changes, pairs, images in (
            (CHANGES, neighbour, IMAGES),
            ({suite: CHANGES[suite] for suite in PATIENT}, superclass, IMAGES_OF_TARGET),
            (PATIENT, superclass, IMAGES_OF_TARGET),
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


def without_targets(anchor: fdu.Concept, run: Erasure) -> fdu.Concept:
    """The anchor with every target in its prompts replaced by that target's own anchor.

    The prompts of "three" name inks: as long as "a three in red ink" leads to "an eight in red ink", red is taught.
    """
    anchors = dict(run.pairs)
    names = re.compile(rf"\b({'|'.join(anchors)})\b")
    prompts = tuple(names.sub(lambda found: anchors[found[0]], prompt) for prompt in anchor.prompts)
    return fdu.Concept(anchor.name, prompts)


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
