"""The runs of the erasure table: which erasures are made, how each is judged, and the file that it leaves."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

import fdu
from fdu.evaluation import JUDGED_SEED, Draws, Probe
from fdu.storage.merging import merge
from fdu.storage.output import write_json
from fdu.storage.versions import versions
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.digits.vocabulary import DIGITS, INKS

BASELINE = "before.json"
ROLES = ("target", "unseen", "retained", "cross_domain")
DRAW: dict[str, Any] = {"seed": JUDGED_SEED, "num_inference_steps": 12, "guidance_scale": 3.0}
"""The seeds of the judged images are none that a training used."""
IMAGES, IMAGES_OF_TARGET = 32, 96
"""Images of a class, and of the target and its unseen phrasings, where chance hides one in ten behind one in five."""
SEEDS = (0, 1, 2)
SEEDED = ("three", "seven", "red")
"""The targets that the suite "concepts" runs with three seeds."""
DIVERGENCES = ("mse", "kl", "squared_hellinger", "jensen_shannon", "alpha:0.3", "pearson_chi2")
SIGMA_SETTINGS: dict[str, dict[str, Any]] = {
    "1": {"sigma": 1.0},
    "auto, s0 = 1": {"sigma": "auto", "s0": 1.0},
    "auto, s0 = 10": {"sigma": "auto", "s0": 10.0},
}
CHANGES: dict[str, tuple[dict[str, Any], ...]] = {
    "objectives": ({"objective": "noise"}, {"negative_guidance": 1.0}),
    "variational": (
        {"variational": True, "divergence": "jensen_shannon"},
        {"variational": True, "divergence": "kl"},
        {"variational": True, "divergence": "squared_hellinger"},
    ),
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
"""Suites of runs that change the default settings, with three seeds; with another method, also the learning rate."""
PATIENT_NOISE = {"objective": "noise", "max_train_steps": 240, "train_batch_size": 32}
"""Against noise as target the gradient is noisy too; towards the superclass, where little is to be left, that shows."""
PATIENT_GAME = {"max_train_steps": 240}
"""Against a critic that learns as well, the last of the target takes more steps too."""
BOTH = {"three": "eight", "red": "black"}
"""Two concepts of different kinds, and their anchors, in the order in which one follows the other."""
ORDERS: dict[str, dict[str, Any]] = {"at_once": {}, "in_sequence": {}, "merged": {}}
"""How two concepts are erased, and what each way needs beside the default settings."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One erasure to make and to judge."""

    suite: str
    target: str
    anchor: str
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()
    roles: tuple[str, ...] = ROLES
    images_of_target: int = IMAGES_OF_TARGET

    def config(self) -> fdu.EraseConfig:
        """All settings: the defaults, but for those of the run."""
        settings = {"preservation_prompts": digits.preserved(self.target), **dict(self.settings), "seed": self.seed}
        return fdu.EraseConfig(**settings)

    @property
    def name(self) -> str:
        """The name of its file."""
        return _name(self.target, self.anchor, self.settings, self.seed)

    def make(self, cache_dir: str | None) -> dict[str, Any]:
        """Erase, draw and judge."""
        target, anchor = digits.concepts(self.target, self.anchor)
        config = dataclasses.replace(self.config(), cache_dir=cache_dir)
        result = fdu.erase(digits.load_pipeline(), target, anchor, config=config)
        probes = [probe for role in self.roles for probe in digits.probes(self.target) if probe.role == role]
        drawn = [draw(result.pipeline, probe, self.images_of_target) for probe in probes]
        return {"figures": figures(probes, drawn), "sigma": result.sigma, "seconds": result.seconds}


@dataclasses.dataclass(frozen=True)
class TwoConcepts:
    """Both concepts erased from one pipeline, and each judged."""

    order: Literal["at_once", "in_sequence", "merged"]
    """Together; or the second with the first one's adapter in place; or with that merged into the weights."""
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()
    suite: ClassVar[str] = "several"

    def config(self) -> fdu.EraseConfig:
        """All settings, for every erasure of the run."""
        settings = {"preservation_prompts": digits.preserved(*BOTH), **dict(self.settings), "seed": self.seed}
        return fdu.EraseConfig(**settings)

    @property
    def name(self) -> str:
        """The name of its file."""
        return _name("-".join(BOTH), self.order, self.settings, self.seed)

    def make(self, cache_dir: str | None) -> dict[str, Any]:
        """Erase, draw and judge; in a sequence, the first concept also before the second erasure."""
        pipeline = digits.load_pipeline()
        config = dataclasses.replace(self.config(), cache_dir=cache_dir)
        pairs = [digits.concepts(*pair) for pair in BOTH.items()]
        record: dict[str, Any] = {}
        if self.order == "at_once":
            targets, anchors = [target for target, _ in pairs], [without_targets(anchor) for _, anchor in pairs]
            results = [fdu.erase(pipeline, targets, anchors, config=config)]
        else:
            results = [fdu.erase(pipeline, *pairs[0], config=config)]
            first = digits.probes(*BOTH)[0]
            (record["first_alone"],) = shares([first], [draw(pipeline, first, IMAGES)]).values()
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


AnyRun = Run | TwoConcepts


def without_targets(anchor: fdu.Concept) -> fdu.Concept:
    """The anchor with every target that its prompts name replaced by that one's own anchor.

    The prompts of "three" name inks: as long as "a three in red ink" leads to "an eight in red ink", red is taught.
    """
    names = re.compile(rf"\b({'|'.join(BOTH)})\b")
    return fdu.Concept(anchor.name, tuple(names.sub(lambda found: BOTH[found[0]], prompt) for prompt in anchor.prompts))


def _name(*parts: Any) -> str:
    *what, settings, seed = parts
    words = [*what, *(f"{key}={value}" for key, value in settings), f"seed={seed}"]
    return "_".join(words).replace(":", "-").replace(" ", "")


def other_class(target: str) -> str:
    """The anchor that is another class: the next digit or ink, and "eight" for "three"."""
    if target == "three":
        return "eight"
    kind = DIGITS if target in DIGITS else INKS
    return kind[(kind.index(target) + 1) % len(kind)]


def runs() -> list[AnyRun]:
    """All runs, in the order in which they are made."""
    targets = (*DIGITS, *INKS)
    concepts = [
        Run("concepts", target, anchor, seed, roles=ROLES if seed == 0 else ROLES[:3])
        for seed in SEEDS
        for target in (targets if seed == 0 else SEEDED)
        for anchor in (digits.SUPERCLASS, other_class(target))
    ]
    divergences = [
        Run("concepts", "three", anchor, seed, (("divergence", divergence),), ROLES[:3])
        for anchor in (other_class("three"), digits.SUPERCLASS)
        for seed in SEEDS
        for divergence in DIVERGENCES
        if divergence != fdu.EraseConfig().divergence
    ]
    short = {"max_train_steps": 40, "preservation_weight": 0.0}
    sigma = [
        Run("sigma", "three", "eight", seed, tuple({"divergence": name, **scale, **short}.items()), ROLES[::2])
        for seed in SEEDS
        for scale in SIGMA_SETTINGS.values()
        for name in ("squared_hellinger", "mse", "pearson_chi2")
    ]
    several = [
        TwoConcepts(order, seed, tuple(settings.items()))  # type: ignore[arg-type]
        for seed in SEEDS
        for order, settings in ORDERS.items()
    ]
    changed = [
        # Towards another class chance does not blur what is left of the target, and fewer images do.
        Run(suite, "three", anchor, seed, tuple(change.items()), ROLES[:3], images)
        for anchor, images in ((other_class("three"), IMAGES), (digits.SUPERCLASS, IMAGES_OF_TARGET))
        for suite, changes in CHANGES.items()
        if anchor != digits.SUPERCLASS or suite in ("objectives", "variational")
        for seed in SEEDS
        for change in changes
    ]
    patient = [
        Run(suite, "three", digits.SUPERCLASS, seed, tuple(settings.items()), ROLES[:3])
        for seed in SEEDS
        for suite, settings in (
            ("objectives", PATIENT_NOISE),
            *(("variational", {**change, **PATIENT_GAME}) for change in CHANGES["variational"]),
        )
    ]
    return [*concepts, *sigma, *divergences, *several, *changed, *patient]


def draw(pipeline: Any, probe: Probe, images_of_target: int) -> Tensor:
    """The judged images of one probe."""
    (images,) = fdu.draw(pipeline, [probe], images_of_target if probe.role in ROLES[:2] else IMAGES, **DRAW).images
    return images


def figures(probes: list[Probe], drawn: list[Tensor]) -> dict[str, Any]:
    """What the judge counts in images."""
    return dataclasses.asdict(fdu.evaluate(Draws(drawn), Draws(drawn), probes).after)


def shares(probes: list[Probe], drawn: list[Tensor]) -> dict[str, float]:
    """By name of a probe, the share of its images that show it."""
    judged = zip(probes, drawn, strict=True)
    return {probe.name: probe.judge(images).count(probe.name) / len(images) for probe, images in judged}


def before(results: Path, workers: int, cache_dir: str | None) -> None:
    """Judge the pipeline as it ships: every class, and every target's unseen phrasings."""
    torch.set_num_threads(1)
    pipeline = digits.load_pipeline()
    seen = [probe for probe in digits.probes("three") if probe.role != "unseen"]
    unseen = [probe for target in (*DIGITS, *INKS) for probe in digits.probes(target) if probe.role == "unseen"]
    counted = [shares(probes, [draw(pipeline, probe, IMAGES) for probe in probes]) for probes in (seen, unseen)]
    write_json(results / BASELINE, {"seen": counted[0], "unseen": counted[1], **conditions()})


def make(run: AnyRun, results: Path, workers: int, cache_dir: str | None) -> None:
    """Make a run and write its record. What runs have in common, as their latents, is kept in ``cache_dir``."""
    torch.set_num_threads(1)
    record = {
        "run": dataclasses.asdict(run),
        **run.make(cache_dir),
        "settings": run.config().as_dict(),
        "workers": workers,
    }
    write_json(results / run.suite / f"{run.name}.json", {**record, **conditions()})


def conditions() -> dict[str, Any]:
    """What every record notes beside its figures."""
    machine = f"{platform.machine()} CPU, 1 thread a process"
    return {"draw": DRAW, "pipeline": fingerprint(), "machine": machine, "versions": versions()}


@functools.cache
def fingerprint() -> str:
    """The first digits of the SHA-256 of the embedded denoiser's weights."""
    (weights,) = (digits.PIPELINE_FOLDER / "unet").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def read(path: Path) -> dict[str, Any] | None:
    """A record of the pipeline as it is now; None if there is none."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record["pipeline"] == fingerprint() else None


def record_of(results: Path, run: AnyRun) -> dict[str, Any] | None:
    """The record of a run with the settings of today; None if it has to be made.

    A setting that a record lacks did not exist when it was made: its default is what was done before.
    """
    record = read(results / run.suite / f"{run.name}.json")
    if record is None:
        return None
    record["settings"] = {**fdu.EraseConfig().as_dict(), **record["settings"]}
    return record if record["settings"] == run.config().as_dict() else None


def load(results: Path, suite: str) -> list[dict[str, Any]]:
    """The records of a suite that are there, in the order of :func:`runs`."""
    found = [record_of(results, run) for run in runs() if run.suite == suite]
    return [record for record in found if record]
