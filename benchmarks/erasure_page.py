"""The page of the erasure table, ``docs/erasure.md``: what the records of all runs say, and whether bounds hold."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from erasure_runs import (
    BASELINE,
    BOTH,
    DIVERGENCES,
    DRAW,
    IMAGES,
    IMAGES_OF_TARGET,
    SIGMA_SETTINGS,
    load,
    other_class,
    read,
    runs,
)
from markdown_table import markdown

import fdu
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.digits.vocabulary import DIGITS, INKS

Record = dict[str, Any]
Baselines = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Judged:
    """The figures of one target of one run."""

    run: str
    """The run, in a few words."""
    superclass: bool
    """Whether the anchor is the superclass, and not another class."""
    figures: dict[str, Any]
    """Shares of images, as :class:`fdu.evaluation.Figures` names them."""
    kept: float
    """Retained accuracy as a share of what it was before."""


BOUNDS: tuple[tuple[str, str, Callable[[Judged], float], float], ...] = (
    ("target accuracy", "superclass", lambda one: one.figures["target_accuracy"], 0.20),
    ("target accuracy, unseen phrasings", "superclass", lambda one: one.figures["unseen_accuracy"], 0.20),
    ("target accuracy", "another class", lambda one: one.figures["target_accuracy"], 0.05),
    ("target accuracy, unseen phrasings", "another class", lambda one: one.figures["unseen_accuracy"], 0.05),
)
"""What of the target may be left at most."""
KEPT = {"variational": 0.90, "several": 0.93}
"""The lowest retained accuracy, as a share of before, of suites that may keep less than 0.95 of it."""
WORST_CLASS = 0.85
"""The lowest accuracy of a retained class."""
REBOUND = 0.05
"""By how much the accuracy of the first concept may rise when the second is erased."""
SHOWN_SETTINGS = (
    "divergence", "sigma", "s0", "train_method", "rank", "max_train_steps", "train_batch_size", "learning_rate",
    "lr_scheduler", "preservation_weight", "num_latents",
)  # fmt: skip


def baseline(judged: Record, target: str) -> dict[str, float]:
    """The figures before the erasure of ``target``, from the shares of all classes."""
    own = DIGITS if target in DIGITS else INKS
    retained = [judged["seen"][name] for name in own if name != target]
    return {
        "target_accuracy": judged["seen"][target],
        "unseen_accuracy": judged["unseen"][target],
        "retained_accuracy": sum(retained) / len(retained),
    }


def setting(record: Record, name: str) -> Any:
    """A setting of a run."""
    return record["settings"][name]


def changes(record: Record) -> str:
    """What of a run's settings is not the default, in words."""
    return ", ".join(f"{name} {value}" for name, value in record["run"]["settings"]) or "default"


def way(record: Record) -> str:
    """How two concepts were erased, in words."""
    settings = f" with {changes(record)}" if record["run"]["settings"] else ""
    return record["run"]["order"].replace("_", " ") + settings


def share(value: float | None) -> str:
    """A share of images, with three digits."""
    return "" if value is None else f"{value:.3f}"


def shares(values: Iterable[float | None]) -> str:
    """Shares of images side by side, one a seed."""
    return " ".join(map(share, values))


def worst_first(values: list[float], lowest: bool) -> str:
    """Median and worst of several runs."""
    worst = min(values) if lowest else max(values)
    return f"{statistics.median(values):.3f} ({worst:.3f})"


def judged(record: Record, baselines: Baselines) -> list[Judged]:
    """The targets of a run: one, or two."""
    run = record["run"]
    several = "order" in run
    by_target = record["figures"] if several else {run["target"]: record["figures"]}
    found = []
    for target, figures in by_target.items():
        anchor = BOTH[target] if several else run["anchor"]
        how = [way(record)] if several else [changes(record)] if run["settings"] else []
        words = ", ".join([*how, f"{target} to {anchor}", f"seed {run['seed']}"])
        kept = figures["retained_accuracy"] / baselines[target]["retained_accuracy"]
        found.append(Judged(words, anchor == digits.SUPERCLASS, figures, kept))
    return found


def concept_rows(records: list[Record], baselines: Baselines) -> list[list[str]]:
    """A row a run: target, unseen and retained accuracy, before and after."""
    rows = []
    for record in records:
        run, after = record["run"], record["figures"]
        was = baselines[run["target"]]
        (one,) = judged(record, baselines)
        rows.append(
            [
                run["target"],
                run["anchor"],
                str(run["seed"]),
                f"{share(was['target_accuracy'])} -> {share(after['target_accuracy'])}",
                f"{share(was['unseen_accuracy'])} -> {share(after['unseen_accuracy'])}",
                f"{share(was['retained_accuracy'])} -> {share(after['retained_accuracy'])}",
                share(one.kept),
                f"{share(after['worst_retained_accuracy'])} {after['worst_retained_class']}",
                share(after["cross_domain_accuracy"]),
            ]
        )
    return rows


def seeds_row(records: list[Record], baselines: Baselines) -> list[str]:
    """The cells of runs that differ by seed alone, from the anchor on."""
    ones = [one for record in records for one in judged(record, baselines)]
    return [
        records[0]["run"]["anchor"],
        shares(one.figures["target_accuracy"] for one in ones),
        shares(one.figures["unseen_accuracy"] for one in ones),
        worst_first([one.kept for one in ones], lowest=True),
        worst_first([one.figures["worst_retained_accuracy"] for one in ones], lowest=True),
    ]


SEEDS_HEADER = ["anchor", "target", "unseen", "retained, of before", "worst retained"]


def divergence_rows(records: list[Record], baselines: Baselines) -> list[list[str]]:
    """A row a divergence and anchor, its seeds side by side."""
    rows = []
    for anchor in (other_class("three"), digits.SUPERCLASS):
        for divergence in DIVERGENCES:
            own = [r for r in records if r["run"]["anchor"] == anchor and setting(r, "divergence") == divergence]
            if own:
                rows.append([divergence, *seeds_row(own, baselines)])
    return rows


def change_rows(records: list[Record], baselines: Baselines) -> list[list[str]]:
    """A row a change of the settings and anchor, its seeds side by side."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["run"]["anchor"], changes(record)), []).append(record)
    return [[words, *seeds_row(own, baselines)] for (_, words), own in groups.items()]


def several_rows(records: list[Record], baselines: Baselines) -> list[list[str]]:
    """A row a way of erasing both and concept, its seeds side by side."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(way(record), []).append(record)
    rows = []
    for words, own in groups.items():
        for number, (target, anchor) in enumerate(BOTH.items()):
            ones = [judged(record, baselines)[number] for record in own]
            alone = [] if number else [record["first_alone"] for record in own if "first_alone" in record]
            rows.append(
                [
                    words,
                    f"{target} to {anchor}",
                    shares(alone),
                    shares(one.figures["target_accuracy"] for one in ones),
                    shares(one.figures["unseen_accuracy"] for one in ones),
                    worst_first([one.kept for one in ones], lowest=True),
                    worst_first([one.figures["worst_retained_accuracy"] for one in ones], lowest=True),
                ]
            )
    return rows


def sigma_rows(records: list[Record]) -> list[list[str]]:
    """A row a scale, a column a divergence: the target accuracy that is left."""
    rows = []
    for label, scale in SIGMA_SETTINGS.items():
        cells = [label]
        for divergence in ("squared_hellinger", "mse", "pearson_chi2"):
            wanted = {"divergence": divergence, **scale}
            own = [r for r in records if all(setting(r, name) == value for name, value in wanted.items())]
            cells.append(shares(record["figures"]["target_accuracy"] for record in own))
        rows.append(cells)
    return rows


def bound_rows(suite: str, records: list[Record], baselines: Baselines) -> list[list[str]]:
    """The bounds that every run of a suite has to keep, and the worst run of each."""
    ones = [one for record in records for one in judged(record, baselines)]
    bounds = [
        ("retained accuracy, share of before", "both", lambda one: one.kept, KEPT.get(suite, 0.95), True),
        ("worst retained class", "both", lambda one: one.figures["worst_retained_accuracy"], WORST_CLASS, True),
        *((*bound, False) for bound in BOUNDS),
    ]
    rows = []
    for label, anchor, figure, bound, lowest in bounds:
        own = [one for one in ones if anchor in ("both", "superclass" if one.superclass else "another class")]
        if own:
            worst = (min if lowest else max)(own, key=figure)
            inside = sum(figure(one) >= bound if lowest else figure(one) <= bound for one in own)
            sign = ">=" if lowest else "<="
            value = f"{figure(worst):.3f} ({worst.run})"
            rows.append([suite, label, anchor, f"{sign} {bound:.2f}", f"{inside} of {len(own)}", value])
    return rows + rebound_rows(suite, records)


def rebound_rows(suite: str, records: list[Record]) -> list[list[str]]:
    """Whether the first of two concepts comes back when the second is erased."""
    first = next(iter(BOTH))
    rises = [
        (record["figures"][first]["target_accuracy"] - record["first_alone"], record)
        for record in records
        if "first_alone" in record
    ]
    if not rises:
        return []
    rise, worst = max(rises, key=lambda one: one[0])
    inside = sum(rise <= REBOUND for rise, _ in rises)
    value = f"{rise:.3f} ({way(worst)}, seed {worst['run']['seed']})"
    bound = f"<= {REBOUND:.2f}"
    return [[suite, "rise of the first concept", "another class", bound, f"{inside} of {len(rises)}", value]]


def write_page(results: Path, docs: Path) -> None:
    """Write the tables of all runs that are there."""
    everything, before = load(results, "concepts"), read(results / BASELINE)
    if not everything or before is None:
        return
    baselines = {target: baseline(before, target) for target in before["seen"]}
    default = fdu.EraseConfig().divergence
    concepts = [record for record in everything if setting(record, "divergence") == default]
    divergences = [record for record in everything if record["run"]["target"] == "three"]
    sigma = load(results, "sigma")
    suites = {name: load(results, name) for name in ("objectives", "variational", "ways", "methods", "several")}
    unchanged = [record for record in concepts if record["run"]["target"] == "three"]
    towards_class = [record for record in unchanged if record["run"]["anchor"] == other_class("three")]
    bounds = [
        row for suite, own in {"concepts": concepts, **suites}.items() for row in bound_rows(suite, own, baselines)
    ]
    total = len(runs())
    made = len(everything) + len(sigma) + sum(map(len, suites.values()))
    used = everything[0]

    def changed(suite: str, beside: list[Record], label: str) -> str:
        rows = change_rows([*beside, *suites[suite]] if suites[suite] else [], baselines)
        return markdown([label, *SEEDS_HEADER], rows)

    page = PAGE.format(
        made=f"all {total}" if made == total else f"{made} of {total}",
        images=IMAGES,
        images_of_target=IMAGES_OF_TARGET,
        steps=DRAW["num_inference_steps"],
        guidance=DRAW["guidance_scale"],
        settings=", ".join(f"{name} {setting(used, name)}" for name in SHOWN_SETTINGS),
        machine=used["machine"],
        versions=", ".join(f"{name} {version}" for name, version in used["versions"].items() if name != "fdu"),
        checks=markdown(["runs", "figure", "anchor", "bound", "inside", "worst"], bounds),
        concepts=markdown(
            ["target", "anchor", "seed", "target", "unseen", "retained", "of before", "worst retained", "other kind"],
            concept_rows(concepts, baselines),
        ),
        divergences=markdown(["divergence", *SEEDS_HEADER], divergence_rows(divergences, baselines)),
        objectives=changed("objectives", unchanged, "objective"),
        variational=changed("variational", [], "settings"),
        ways=changed("ways", towards_class, "settings"),
        methods=changed("methods", towards_class, "method"),
        several=markdown(
            ["way", "concept", "after the first alone", *SEEDS_HEADER[1:]], several_rows(suites["several"], baselines)
        ),
        sigma=markdown(["sigma", "squared_hellinger", "mse", "pearson_chi2"], sigma_rows(sigma)),
        sigma_retained=share(min((one["figures"]["retained_accuracy"] for one in sigma), default=None)) or "-",
    )
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page)


PAGE = """# Every class of the embedded pipeline, erased

Made by `python benchmarks/erasure_table.py` ({made} runs; the raw figures are in `benchmarks/results/erasure/`).
{machine}; {versions}.

Each row is one erasure with the default settings ({settings}), or with what the row names changed. Preserved are the
superclass and the neighbours of the target's kind, in one of the phrasings that are judged. Judged are {images} images
a class ({images_of_target} of the target where chance matters), {steps} steps, guidance {guidance}, from seeds that no
training used, by a classifier that learnt from real digits and never saw the generator. "Unseen" are phrasings of the
target that training never had; "other kind" are the inks if a digit was erased, and the digits if an ink was. Towards
the superclass, chance is one image in ten for a digit and one in twenty for an ink.

The text embeddings of this pipeline are nearly orthogonal, those of a real CLIP are not: there, expect more harm to
neighbours than here.

## Bounds

What each of the sections below has to keep, and its worst run.

{checks}

## Every target

"concepts" above.

{concepts}

## The divergence, with sigma calibrated

Erasing "three", one figure a seed; retained as median (worst) of the seeds. `kl` is half of `mse`, which the
standardisation to h'(0) = 1 takes out: the two train the same model.

{divergences}

## The objective

"objectives" above. Erasing "three", one figure a seed, as in the section before. The default draws the trained output
to the frozen one on the anchor's prompt; "noise" to the noise in the anchor's latents; negative guidance goes beyond
the anchor, away from the target. Noise as a target makes a noisy gradient: towards the superclass, "noise" needs more
samples than the default 120 steps of 16.

{objectives}

## The variational objective

"variational" above. The divergence is estimated by a critic in a min-max game, as the paper does where it has no closed
form. Towards the superclass 120 steps, the default, end just above the bound in some runs; 240 do not.

{variational}

## Weightings, timesteps, surgery, kept outputs

"ways" above.

{ways}

## What is trained

"methods" above. Each method with a learning rate that suits it.

{methods}

## Two concepts

"several" above: a digit and an ink, erased at once, or one after the other with the first result's adapter in place, or
with that merged into the weights before the second. At once, no anchor may name a concept that is erased: "a three in
red ink" leads to "an eight in black ink", or the prompts of "three" would teach red. "After the first alone" is the
first concept's accuracy before the second erasure: that it does not come back is a bound above. Retained are the other
classes of the concept's kind.

{several}

## What sigma decides

"three" to "eight", stopped early (40 steps, no preservation): the target accuracy that is left, one
figure a seed. At sigma = 1, s is far below 1, every divergence is a multiple of mse, and Adam removes the factor:
expect equal columns. Calibrated, the divergence matters: expect the chi-square, whose few large errors take the whole
step, to erase slower under Adam. The lowest retained accuracy of these runs was {sigma_retained}.

{sigma}
"""
