"""Erase every digit and every ink from the embedded pipeline, in every way there is, judge, and write docs/erasure.md.

    python experiments/erasure.py                       # resumes where it was stopped
    python experiments/erasure.py --only several        # one suite (they are listed in erasure_runs.py)

Takes about four hours of one core, shared by ``--workers`` processes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import erasure_runs as plan
from erasure_runs import Erasure, other_class
from experiment import conditions, fill, of_total, run

from fdu.comparison.page import markdown
from fdu.comparison.sweep import Record, Records
from fdu.storage.output import write_text
from fdu.subjects.digits.pipeline import SUPERCLASS
from fdu.subjects.digits.vocabulary import DIGITS, INKS


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One target of one run that has a record."""

    run: Erasure
    target: str
    figures: dict[str, Any]
    """Shares of images, as :class:`fdu.evaluation.Figures` names them."""
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
    def way(self) -> str:
        """How two concepts were erased, in words."""
        return self.run.order.replace("_", " ") + (f" with {self.changes}" if self.run.settings else "")

    @property
    def words(self) -> str:
        """The run in a few words."""
        how = [self.way] if len(self.run.pairs) > 1 else [self.changes] if self.run.settings else []
        return ", ".join([*how, f"{self.target} to {self.anchor}", f"seed {self.run.seed}"])


Outcomes = Sequence[Outcome]


def kept(one: Outcome) -> float:
    """Retained accuracy as a share of what it was before."""
    return one.figures["retained_accuracy"] / one.before["retained_accuracy"]


def rise(one: Outcome) -> float | None:
    """By how much the first concept's accuracy rose when the second was erased."""
    return None if one.alone is None else one.figures["target_accuracy"] - one.alone


Figure = Callable[[Outcome], Any]
BOUNDS: tuple[tuple[str, str, Figure, float, bool], ...] = (
    ("retained accuracy, share of before", "both", kept, 0.95, True),
    ("worst retained class", "both", lambda one: one.figures["worst_retained_accuracy"], 0.85, True),
    ("target accuracy", "superclass", lambda one: one.figures["target_accuracy"], 0.20, False),
    ("target accuracy, unseen phrasings", "superclass", lambda one: one.figures["unseen_accuracy"], 0.20, False),
    ("target accuracy", "another class", lambda one: one.figures["target_accuracy"], 0.05, False),
    ("target accuracy, unseen phrasings", "another class", lambda one: one.figures["unseen_accuracy"], 0.05, False),
    ("rise of the first concept", "another class", rise, 0.05, False),
)
"""Figure, kind of the anchor, and the lowest (True) or highest (False) value that it may have."""
KEPT = {"variational": 0.90, "several": 0.93}
"""The lowest ``kept`` of suites that may keep less."""
SHOWN_SETTINGS = (
    "divergence", "sigma", "s0", "train_method", "rank", "max_train_steps", "train_batch_size", "learning_rate",
    "lr_scheduler", "preservation_weight", "num_latents",
)  # fmt: skip
SEEDS_HEADER = ["anchor", "target", "unseen", "retained, of before", "worst retained"]


def baseline(shares: Record, target: str) -> dict[str, float]:
    """The figures before the erasure of ``target``, from the shares of all classes."""
    retained = [shares["seen"][name] for name in (DIGITS if target in DIGITS else INKS) if name != target]
    return {
        "target_accuracy": shares["seen"][target],
        "unseen_accuracy": shares["unseen"][target],
        "retained_accuracy": sum(retained) / len(retained),
    }


def outcomes(records: Records, before: Record) -> list[Outcome]:
    """Everything with a record that is up to date, in the order of :func:`erasure_runs.runs`."""
    found = [(run, records.of(run.name, run.identity)) for run in plan.runs()]
    return [
        Outcome(run, target, figures, baseline(before, target), None if place else record.get("first_alone"))
        for run, record in found
        if record is not None and "failed" not in record
        for place, (target, figures) in enumerate(record["figures"].items())
    ]


def grouped(ones: Outcomes, key: Callable[[Outcome], Any]) -> dict[Any, list[Outcome]]:
    """By key, in the order of first appearance."""
    found: dict[Any, list[Outcome]] = {}
    for one in ones:
        found.setdefault(key(one), []).append(one)
    return found


def share(value: float | None) -> str:
    """A share of images, with three digits."""
    return "" if value is None else f"{value:.3f}"


def shares(values: Iterable[float | None]) -> str:
    """Shares of images side by side, one per seed."""
    return " ".join(map(share, values))


def median_and_worst(values: list[float]) -> str:
    """Median and lowest of several runs."""
    return f"{statistics.median(values):.3f} ({min(values):.3f})"


def concept_rows(ones: Outcomes) -> list[list[str]]:
    """One row per run: target, unseen and retained accuracy, before and after."""
    kinds = ("target_accuracy", "unseen_accuracy", "retained_accuracy")
    return [
        [
            one.target,
            one.anchor,
            str(one.run.seed),
            *(f"{share(one.before[kind])} -> {share(one.figures[kind])}" for kind in kinds),
            share(kept(one)),
            f"{share(one.figures['worst_retained_accuracy'])} {one.figures['worst_retained_class']}",
            share(one.figures["cross_domain_accuracy"]),
        ]
        for one in ones
    ]


def seeds_cells(ones: Outcomes) -> list[str]:
    """The cells of runs that differ by seed alone, after the anchor's."""
    return [
        shares(one.figures["target_accuracy"] for one in ones),
        shares(one.figures["unseen_accuracy"] for one in ones),
        median_and_worst([kept(one) for one in ones]),
        median_and_worst([one.figures["worst_retained_accuracy"] for one in ones]),
    ]


def divergence_rows(ones: Outcomes) -> list[list[str]]:
    """One row per divergence and anchor, its seeds side by side."""
    found = grouped(ones, lambda one: (one.anchor, one.run.config.divergence))
    order = [(anchor, name) for anchor in (other_class("three"), SUPERCLASS) for name in plan.DIVERGENCES]
    return [[key[1], key[0], *seeds_cells(found[key])] for key in order if key in found]


def change_rows(ones: Outcomes) -> list[list[str]]:
    """One row per change of the settings and anchor, its seeds side by side."""
    found = grouped(ones, lambda one: (one.anchor, one.changes))
    return [[changes, anchor, *seeds_cells(own)] for (anchor, changes), own in found.items()]


def several_rows(ones: Outcomes) -> list[list[str]]:
    """One row per way of erasing both and concept, its seeds side by side."""
    return [
        [
            way,
            f"{target} to {own[0].anchor}",
            shares(one.alone for one in own if one.alone is not None),
            *seeds_cells(own),
        ]
        for (way, target), own in grouped(ones, lambda one: (one.way, one.target)).items()
    ]


def sigma_rows(ones: Outcomes) -> list[list[str]]:
    """One row per scale, one column per divergence: the target accuracy that is left."""

    def left(wanted: dict[str, Any]) -> str:
        own = [one for one in ones if wanted.items() <= dict(one.run.settings).items()]
        return shares(one.figures["target_accuracy"] for one in own)

    return [
        [label, *(left({"divergence": divergence, **scale}) for divergence in plan.SIGMA_DIVERGENCES)]
        for label, scale in plan.SIGMA_SETTINGS.items()
    ]


def bound_rows(suite: str, ones: Outcomes) -> list[list[str]]:
    """The bounds that every run of a suite must keep, and the worst run of each."""
    rows = []
    for label, anchor, figure, bound, lowest in BOUNDS:
        limit = KEPT.get(suite, bound) if figure is kept else bound
        own = [one for one in ones if anchor in ("both", one.kind) and figure(one) is not None]
        if own:
            worst = (min if lowest else max)(own, key=figure)
            inside = sum(figure(one) >= limit if lowest else figure(one) <= limit for one in own)
            shown = f"{'>=' if lowest else '<='} {limit:.2f}"
            rows.append(
                [suite, label, anchor, shown, f"{inside} of {len(own)}", f"{figure(worst):.3f} ({worst.words})"]
            )
    return rows


def write_page(results: Path, docs: Path) -> None:
    """Write the tables of all runs that have a record."""
    records = Records(results / "erasure.jsonl")
    before = records.of(plan.BASELINE, plan.conditions())
    everything = [] if before is None else outcomes(records, before)
    suites = grouped(everything, lambda one: one.run.suite)
    if before is None or "concepts" not in suites:
        return
    used = everything[0].run.config
    concepts = [one for one in suites["concepts"] if one.run.config.divergence == used.divergence]
    unchanged = [one for one in concepts if one.target == "three"]
    towards_class = [one for one in unchanged if one.anchor == other_class("three")]
    checked = ("objectives", "variational", "ways", "methods", "several")
    bounds = {"concepts": concepts, **{suite: suites.get(suite, []) for suite in checked}}
    sigma = suites.get("sigma", [])

    def changed(suite: str, beside: Outcomes, label: str) -> str:
        return markdown([label, *SEEDS_HEADER], change_rows([*beside, *suites[suite]] if suite in suites else []))

    page = fill(
        "erasure.md",
        plan=plan,
        made=of_total(len({one.run.name for one in everything}), len(plan.runs())),
        settings=", ".join(f"{name} {used.as_dict()[name]}" for name in SHOWN_SETTINGS),
        **conditions(before, without=("fdu",)),
        checks=markdown(
            ["runs", "figure", "anchor", "bound", "inside", "worst"],
            [row for suite, ones in bounds.items() for row in bound_rows(suite, ones)],
        ),
        concepts=markdown(
            ["target", "anchor", "seed", "target", "unseen", "retained", "of before", "worst retained", "other kind"],
            concept_rows(concepts),
        ),
        divergences=markdown(
            ["divergence", *SEEDS_HEADER],
            divergence_rows([one for one in suites["concepts"] if one.target == "three"]),
        ),
        objectives=changed("objectives", unchanged, "objective"),
        variational=changed("variational", [], "settings"),
        ways=changed("ways", towards_class, "settings"),
        methods=changed("methods", towards_class, "method"),
        several=markdown(
            ["way", "concept", "after the first alone", *SEEDS_HEADER[1:]], several_rows(suites.get("several", []))
        ),
        sigma=markdown(["sigma", *plan.SIGMA_DIVERGENCES], sigma_rows(sigma)),
        sigma_retained=share(min((one.figures["retained_accuracy"] for one in sigma), default=None)) or "-",
    )
    write_text(docs / "erasure.md", page)


if __name__ == "__main__":
    run(__doc__, lambda cache: {"erasure": plan.jobs(cache)}, write_page)
