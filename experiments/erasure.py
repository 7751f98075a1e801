"""Erase every digit and every ink from the digits pipeline, in every way there is, judge, and write docs/erasure.md.

    python experiments/erasure.py                      # resumes where it was stopped
    python experiments/erasure.py --only several/      # one suite

Takes about four hours of one core, shared by ``--workers`` processes.

Suites: "concepts" (every target, towards the superclass and towards another class; one digit with every divergence),
"sigma" (short runs without preservation, where sigma decides whether the divergence matters), "several" (two concepts,
at once or one after the other), "objectives", "variational", "ways" (weightings, timesteps, gradient surgery, frozen
batches) and "methods" (which weights are trained).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiment import conditions, current, dated, fill, of_total, run
from torch import Tensor

import fdu
from fdu.comparison.page import markdown
from fdu.comparison.runs import weights
from fdu.comparison.sweep import Job, Record, settings_identity
from fdu.evaluation import JUDGED_SEED, Draws, Probe
from fdu.storage.merging import merge
from fdu.storage.output import write_text
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.digits.pipeline import SUPERCLASS
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
SCALES: tuple[dict[str, Any], ...] = ({"sigma": 1.0}, {"sigma": "auto", "s0": 1.0}, {"sigma": "auto", "s0": 10.0})
SHORT = {"max_train_steps": 40, "preservation_weight": 0.0}
GAMES = [{"variational": True, "divergence": name} for name in ("jensen_shannon", "kl", "squared_hellinger")]
OBJECTIVES = [{"objective": "noise"}, {"negative_guidance": 1.0}]
OTHER_DIVERGENCES = [{"divergence": name} for name in DIVERGENCES if name != fdu.EraseConfig().divergence]
TO_CLASS, TO_SUPERCLASS = (("three", "eight"),), (("three", SUPERCLASS),)
CHANGES: tuple[tuple[str, tuple[tuple[str, str], ...], int, Sequence[dict[str, Any]]], ...] = (
    ("sigma", TO_CLASS, IMAGES_OF_TARGET, [
        {"divergence": name, **scale, **SHORT}
        for scale in SCALES
        for name in ("squared_hellinger", "mse", "pearson_chi2")
    ]),
    ("concepts", TO_CLASS, IMAGES_OF_TARGET, OTHER_DIVERGENCES),
    ("concepts", TO_SUPERCLASS, IMAGES_OF_TARGET, OTHER_DIVERGENCES),
    ("objectives", TO_CLASS, IMAGES, OBJECTIVES),
    ("variational", TO_CLASS, IMAGES, GAMES),
    ("methods", TO_CLASS, IMAGES, [
        {"train_method": "dora"},
        {"train_method": "cross_attention", "learning_rate": 1e-3},
        {"train_method": "attention", "learning_rate": 5e-4},
        {"train_method": "full", "learning_rate": 2e-4},
        {"train_method": "text_encoder", "learning_rate": 5e-4},
        {"train_method": "token", "learning_rate": 0.2},
    ]),
    ("ways", TO_CLASS, IMAGES, [
        {"weighting": "posterior"},
        {"weighting": "min_snr"},
        {"weighting": "p2"},
        {"timestep_sampling": "importance"},
        {"gradient_surgery": True},
        {"frozen_batches": 40},
    ]),
    ("objectives", TO_SUPERCLASS, IMAGES_OF_TARGET, OBJECTIVES),
    ("variational", TO_SUPERCLASS, IMAGES_OF_TARGET, GAMES),
    # Noise as the target, or a critic that learns too, needs more samples towards the superclass.
    ("objectives", TO_SUPERCLASS, IMAGES_OF_TARGET, [
        {"objective": "noise", "max_train_steps": 240, "train_batch_size": 32},
    ]),
    ("variational", TO_SUPERCLASS, IMAGES_OF_TARGET, [{**game, "max_train_steps": 240} for game in GAMES]),
)  # fmt: skip
"""Suite, pairs, images of the target, and changes of the default settings; each change runs with all seeds."""
BOTH = (("three", "eight"), ("red", "black"))
"""Two concepts of different kinds and their anchors, in the order of erasure."""
ORDERS = ("at_once", "in_sequence", "merged")
"""Both together; or the second while the first one's adapter is in place, or merged into the weights."""


@dataclasses.dataclass(frozen=True)
class Erasure:
    """One run: concepts erased from the pipeline, and each of them judged."""

    suite: str
    pairs: tuple[tuple[str, str], ...]
    """Targets and their anchors."""
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()
    """The settings that differ from the defaults."""
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

    @functools.cached_property
    def config(self) -> fdu.EraseConfig:
        """All settings, for each of its erasures."""
        preserved = digits.preserved(*dict(self.pairs))
        return fdu.EraseConfig(**{"preservation_prompts": preserved, **dict(self.settings), "seed": self.seed})

    def job(self, cache: Path) -> Job:
        """The job that makes its record."""
        settings = settings_identity(self.config)
        identity = {**dataclasses.asdict(self), "settings": settings, **judging()}
        return dated(Job(self.name, identity, functools.partial(self.make, cache)), *self.pairs)

    def make(self, cache: Path) -> Record:
        """Erase, draw and judge; between two erasures in sequence, also judge the first concept."""
        pipeline = digits.load_pipeline()
        config = dataclasses.replace(self.config, cache_dir=str(cache))
        pairs = [digits.concepts(*pair) for pair in self.pairs]
        record: Record = {}
        if self.order == "at_once":
            targets, anchors = [target for target, _ in pairs], [without_targets(anchor, self) for _, anchor in pairs]
            results = [fdu.erase(pipeline, targets, anchors, config=config)]
        else:
            results = [fdu.erase(pipeline, *pairs[0], config=config)]
            record["first_alone"] = counted(pipeline, digits.probes(*dict(self.pairs))[0])
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


def judging() -> Record:
    """Pipeline and drawing, which all figures depend on."""
    return {"weights": weights("digits"), "images_per_class": IMAGES, "draw": DRAW}


def jobs(cache: Path) -> list[Job]:
    """The pipeline as it ships, then all runs."""
    first = Job(BASELINE, judging(), before, first=True)
    return [dated(first, *((name, SUPERCLASS) for name in (*DIGITS, *INKS))), *(one.job(cache) for one in runs())]


@functools.cache
def runs() -> list[Erasure]:
    """All runs, in the order in which they are made."""
    concepts = [
        Erasure("concepts", ((target, anchor),), seed, roles=ROLES if seed == 0 else ROLES[:3])
        for seed in SEEDS
        for target in ((*DIGITS, *INKS) if seed == 0 else SEEDED)
        for anchor in (SUPERCLASS, other_class(target))
    ]
    several = [
        Erasure("several", BOTH, seed, images_of_target=IMAGES, order=order) for seed in SEEDS for order in ORDERS
    ]
    changed = [
        Erasure(suite, pairs, seed, tuple(change.items()), ROLES[::2] if suite == "sigma" else ROLES[:3], images)
        for suite, pairs, images, changes in CHANGES
        for seed in SEEDS
        for change in changes
    ]
    return [*concepts, *several, *changed]


def other_class(target: str) -> str:
    """The anchor that is another class: the next digit or ink, and "eight" for "three"."""
    kind = DIGITS if target in DIGITS else INKS
    return "eight" if target == "three" else kind[(kind.index(target) + 1) % len(kind)]


def without_targets(anchor: fdu.Concept, run: Erasure) -> fdu.Concept:
    """The anchor with every target in its prompts replaced by that target's own anchor.

    The prompts of "three" name inks: if "a three in red ink" led to "an eight in red ink", training would teach red.
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
    return {
        name: {probe.name: counted(pipeline, probe) for probe in probes}
        for name, probes in (("seen", seen), ("unseen", unseen))
    }


def draw(pipeline: Any, probe: Probe, images_of_target: int = IMAGES) -> Tensor:
    """The judged images of one probe."""
    (images,) = fdu.draw(pipeline, [probe], images_of_target if probe.role in ROLES[:2] else IMAGES, **DRAW).images
    return images


def counted(pipeline: Any, probe: Probe) -> float:
    """The share of a probe's images that show it."""
    images = draw(pipeline, probe)
    return probe.judge(images).count(probe.name) / len(images)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One target of one run that has a record."""

    run: Erasure
    target: str
    figures: dict[str, Any]
    """Shares of images, as :class:`fdu.evaluation.Figures` names them. "kept" is the retained accuracy divided by that
    before; "rise" is the rise of the first concept's accuracy when the second was erased."""
    before: dict[str, float]
    """Target, unseen and retained accuracy before the erasure."""
    alone: float | None
    """The first of two concepts: its accuracy before the second erasure."""

    @property
    def anchor(self) -> str:
        return dict(self.run.pairs)[self.target]

    @property
    def kind(self) -> str:
        """The kind of the anchor."""
        return "superclass" if self.anchor == SUPERCLASS else "another class"

    @property
    def changes(self) -> str:
        """The settings that are not the default, in words."""
        return ", ".join(f"{name} {value}" for name, value in self.run.settings) or "default"

    @property
    def scale(self) -> str:
        """The settings of sigma, in words."""
        return ", ".join(f"{name} {value}" for name, value in self.run.settings if name in ("sigma", "s0"))

    @property
    def way(self) -> str:
        """How two concepts were erased, in words."""
        return self.run.order.replace("_", " ")

    @property
    def words(self) -> str:
        """The run in a few words."""
        how = [self.way] if len(self.run.pairs) > 1 else [self.changes] if self.run.settings else []
        return ", ".join([*how, f"{self.target} to {self.anchor}", f"seed {self.run.seed}"])


Outcomes = Sequence[Outcome]


BOUNDS = (
    ("retained accuracy, share of before", "kept", "both", 0.95, True),
    ("worst retained class", "worst_retained_accuracy", "both", 0.85, True),
    ("target accuracy", "target_accuracy", "superclass", 0.20, False),
    ("target accuracy, unseen phrasings", "unseen_accuracy", "superclass", 0.20, False),
    ("target accuracy", "target_accuracy", "another class", 0.05, False),
    ("target accuracy, unseen phrasings", "unseen_accuracy", "another class", 0.05, False),
    ("rise of the first concept", "rise", "another class", 0.05, False),
)
"""Label, figure, kind of the anchor, and the lowest (True) or highest (False) value that the figure may have."""
KEPT = {"variational": 0.90, "several": 0.93}
"""The lowest "kept" of suites that may keep less."""
SHOWN_SETTINGS = (
    "divergence", "sigma", "s0", "train_method", "rank", "max_train_steps", "train_batch_size", "learning_rate",
    "lr_scheduler", "preservation_weight", "num_latents",
)  # fmt: skip
NOT_MEASURED = "Not measured yet."


def outcomes(found: dict[str, Record]) -> list[Outcome]:
    """The targets of all runs that have a record, in the order of :func:`runs`."""
    return [
        outcome(one, target, figures, found[BASELINE], None if place else record.get("first_alone"))
        for one in runs()
        if (record := found.get(one.name)) is not None
        for place, (target, figures) in enumerate(record["figures"].items())
    ]


def outcome(run: Erasure, target: str, figures: Record, baseline: Record, alone: float | None) -> Outcome:
    """One target of one run, with the figures that compare it with the pipeline as it ships."""
    retained = [baseline["seen"][name] for name in (DIGITS if target in DIGITS else INKS) if name != target]
    before = {
        "target_accuracy": baseline["seen"][target],
        "unseen_accuracy": baseline["unseen"][target],
        "retained_accuracy": sum(retained) / len(retained),
    }
    kept = figures["retained_accuracy"] / before["retained_accuracy"]
    rise = None if alone is None else figures["target_accuracy"] - alone
    return Outcome(run, target, {**figures, "kept": kept, "rise": rise}, before, alone)


def grouped(ones: Outcomes, key: Callable[[Outcome], Any]) -> dict[Any, list[Outcome]]:
    """The outcomes by key, in the order of first appearance."""
    found: dict[Any, list[Outcome]] = {}
    for one in ones:
        found.setdefault(key(one), []).append(one)
    return found


def side_by_side(values: Iterable[float | None]) -> str:
    """Shares of images that were measured, one per seed."""
    return " ".join(share(value) for value in values if value is not None)


def share(value: float | None) -> str:
    """A share of images, with three digits."""
    return "" if value is None else f"{value:.3f}"


def median_and_worst(values: list[float]) -> str:
    """Median and lowest of several runs."""
    return f"{statistics.median(values):.3f} ({min(values):.3f})"


def concept_table(ones: Outcomes) -> str:
    """One row per run: target, unseen and retained accuracy, before and after."""
    kinds = ("target_accuracy", "unseen_accuracy", "retained_accuracy")
    rows = [
        [
            one.target,
            one.anchor,
            str(one.run.seed),
            *(f"{share(one.before[kind])} -> {share(one.figures[kind])}" for kind in kinds),
            share(one.figures["kept"]),
            f"{share(one.figures['worst_retained_accuracy'])} {one.figures['worst_retained_class']}",
            share(one.figures["cross_domain_accuracy"]),
        ]
        for one in ones
    ]
    header = ["target", "anchor", "seed", "target", "unseen", "retained", "of before", "worst retained", "other kind"]
    return markdown(header, rows)


def seeds_table(ones: Outcomes, **columns: Callable[[Outcome], str]) -> str:
    """One row per value of the named columns; the figures of its seeds side by side."""
    if not ones:
        return NOT_MEASURED
    rows = [
        [
            *key,
            *([side_by_side(one.alone for one in own)] if len(ones[0].run.pairs) > 1 else []),
            side_by_side(one.figures["target_accuracy"] for one in own),
            side_by_side(one.figures["unseen_accuracy"] for one in own),
            median_and_worst([one.figures["kept"] for one in own]),
            median_and_worst([one.figures["worst_retained_accuracy"] for one in own]),
        ]
        for key, own in grouped(ones, lambda one: tuple(column(one) for column in columns.values())).items()
    ]
    alone = ["after the first alone"] if len(ones[0].run.pairs) > 1 else []
    return markdown([*columns, *alone, "target", "unseen", "retained, of before", "worst retained"], rows)


def bound_rows(suite: str, ones: Outcomes) -> list[list[str]]:
    """The bounds that every run of a suite must keep, and the worst run of each."""
    rows = []
    for label, figure, anchor, bound, lowest in BOUNDS:
        limit = KEPT.get(suite, bound) if figure == "kept" else bound
        own = [one for one in ones if anchor in ("both", one.kind) and one.figures[figure] is not None]
        if own:
            worst = (min if lowest else max)(own, key=lambda one, figure=figure: one.figures[figure])
            inside = sum(one.figures[figure] >= limit if lowest else one.figures[figure] <= limit for one in own)
            shown = f"{'>=' if lowest else '<='} {limit:.2f}"
            said = f"{worst.figures[figure]:.3f} ({worst.words})"
            rows.append([suite, label, anchor, shown, f"{inside} of {len(own)}", said])
    return rows


def write_page(results: Path, docs: Path) -> None:
    """Write the tables of all runs that have a record."""
    found = current(results, "erasure", jobs(Path()))
    if BASELINE not in found:
        print(f"docs/erasure.md is left as it is: it compares with the record {BASELINE!r}, which is missing")
        return
    everything = outcomes(found)
    default = fdu.EraseConfig()
    suites = collections.defaultdict(list, grouped(everything, lambda one: one.run.suite))
    concepts = [one for one in suites["concepts"] if one.run.config.divergence == default.divergence]
    unchanged = [one for one in concepts if one.target == "three"]
    towards_class = [one for one in unchanged if one.anchor == other_class("three")]
    checked = ("objectives", "variational", "ways", "methods", "several")
    bounds = {"concepts": concepts, **{suite: suites[suite] for suite in checked}}

    def changed(suite: str, beside: Outcomes, label: str) -> str:
        ones = [*beside, *suites[suite]] if suites[suite] else []
        return seeds_table(ones, **{label: lambda one: one.changes, "anchor": lambda one: one.anchor})

    page = fill(
        "erasure.md",
        images=IMAGES,
        images_of_target=IMAGES_OF_TARGET,
        draw=DRAW,
        made=of_total(len({one.run.name for one in everything}), len(runs())),
        settings=", ".join(f"{name} {default.as_dict()[name]}" for name in SHOWN_SETTINGS),
        **conditions(found[BASELINE]),
        checks=markdown(
            ["runs", "figure", "anchor", "bound", "inside", "worst"],
            [row for suite, ones in bounds.items() for row in bound_rows(suite, ones)],
        ),
        concepts=concept_table(concepts),
        divergences=seeds_table(
            sorted(
                (one for one in suites["concepts"] if one.target == "three"),
                key=lambda one: (one.anchor == SUPERCLASS, DIVERGENCES.index(one.run.config.divergence)),
            ),
            divergence=lambda one: one.run.config.divergence,
            anchor=lambda one: one.anchor,
        ),
        objectives=changed("objectives", unchanged, "objective"),
        variational=changed("variational", [], "settings"),
        ways=changed("ways", towards_class, "settings"),
        methods=changed("methods", towards_class, "method"),
        several=seeds_table(
            suites["several"], way=lambda one: one.way, concept=lambda one: f"{one.target} to {one.anchor}"
        ),
        sigma=seeds_table(
            suites["sigma"], scale=lambda one: one.scale, divergence=lambda one: one.run.config.divergence
        ),
        sigma_retained=share(min((one.figures["retained_accuracy"] for one in suites["sigma"]), default=None))
        or "not measured yet",
    )
    write_text(docs / "erasure.md", page)


if __name__ == "__main__":
    run(__doc__, "erasure", jobs, write_page)
