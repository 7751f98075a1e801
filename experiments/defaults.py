"""Choose the default settings on both pipelines of fdu, confirm them on other targets, and write docs/defaults.md.

    python experiments/defaults.py        # resumes where it was stopped

Takes about an hour of two cores, shared by ``--workers`` processes.

Three rounds, on each pipeline: the former defaults with one setting changed (one seed); the most promising settings and
the former defaults (three seeds), from which a rule chooses; the choice and the former defaults on targets that
neither the rounds before nor the rule have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import DRAWING, FIGURES, Suite, all_jobs, changed, changes, fill, run, told_of

from fdu.comparison.front import Sample, complete
from fdu.comparison.page import markdown, percent
from fdu.comparison.plan import Candidate, Comparison
from fdu.comparison.results import Results
from fdu.comparison.sweep import Job, Records
from fdu.storage.output import write_text

FORMER: dict[str, Any] = {"learning_rate": 2e-3, "preservation_weight": 1.0}
"""The settings whose defaults changed, as they were."""
CHOSEN: dict[str, Any] = {"learning_rate": 4e-3, "preservation_weight": 4.0}
"""What the rule chooses from the finalists."""
SECOND: dict[str, Any] = {"learning_rate": 4e-3, "preservation_weight": 2.0}
"""What it would choose without that."""
CHANGES: tuple[dict[str, Any], ...] = (
    {"learning_rate": 1e-3},
    {"learning_rate": 4e-3},
    {"max_train_steps": 60},
    {"max_train_steps": 240},
    {"preservation_weight": 2.0},
    {"preservation_weight": 4.0},
    {"s0": 0.3},
    {"s0": 10.0},
    {"divergence": "mse"},
    {"divergence": "jensen_shannon"},
    {"divergence": "pearson_chi2"},
    {"adapter_layers": "attention"},
    {"rank": 4},
)
FINALISTS: tuple[dict[str, Any], ...] = (
    {"learning_rate": 4e-3},
    SECOND,
    CHOSEN,
    {"s0": 10.0},
)
SEEDS = (0, 1, 2)
SEEN = {"emoji": (("fox", "wolf"), ("strawberry", "fruit")), "digits": (("seven", "digit"), ("red", "green"))}
HELD_OUT = {
    "emoji": (("turtle", "crocodile"), ("banana", "fruit"), ("fluent", "noto")),
    "digits": (("nine", "digit"), ("blue", "black")),
}
"""By pipeline, targets and anchors of the first two rounds, and of the confirmation."""
TOLERANCE = 0.02
"""The rule: how much less of a target, as a share of its images, a candidate may erase than the former defaults."""
ROUNDS = ("screening", "finalists", "confirmation")


def candidate(settings: Mapping[str, Any]) -> Candidate:
    """The former defaults with these settings changed."""
    return changed({**FORMER, **settings})


def suites(model: str) -> dict[str, Suite]:
    """The rounds on a pipeline. The first two share their runs with the first seed."""
    former = candidate({})

    def suite(pairs: Sequence[tuple[str, str]], changes: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Suite:
        competing = (former, *map(candidate, changes))
        return Suite(model, Comparison(model, tuple(pairs), competing, tuple(seeds), drawing=DRAWING[model]))

    found = (
        suite(SEEN[model], CHANGES, SEEDS[:1]),
        suite(SEEN[model], FINALISTS, SEEDS),
        suite(HELD_OUT[model], (CHOSEN, SECOND), SEEDS),
    )
    return dict(zip(ROUNDS, found, strict=True))


def jobs(cache: Path) -> list[Job]:
    """The jobs of all rounds on both pipelines, round by round."""
    both = [suites(model) for model in SEEN]
    return all_jobs([one[name] for name in ROUNDS for one in both], cache)


def choose(by_model: Sequence[Results]) -> Candidate:
    """The finalist that the rule chooses from the results of all pipelines.

    Able are the candidates that erase as much of every target as the former defaults, up to ``TOLERANCE``. Tied are the
    one of them that keeps most of what else the prompts ask for, and those whose difference from it may be chance. Of
    the tied, the one that changes the images of other classes least is chosen.
    """
    former = candidate({})
    targets = [each for results in by_model for each in by_target(results)]
    common = [one for one in by_model[0].sample.candidates if all(one in each.sample.candidates for each in by_model)]
    able = [
        one for one in common if all(each.difference("erased", one, former).value >= -TOLERANCE for each in targets)
    ]

    def total(figure: str, one: Candidate) -> float:
        return sum(each.sample.estimate(figure, one).value for each in by_model)

    best = max(able, key=lambda one: total("attributes", one))
    tied = [one for one in able if all(each.sample.difference("attributes", one, best).sign >= 0 for each in by_model)]
    return min(tied, key=lambda one: total("change", one))


def by_target(results: Results) -> list[Sample]:
    """The sample of each target alone."""
    candidates = results.sample.candidates
    whole = complete(results.runs, candidates)
    targets = dict.fromkeys(target for target, _, _ in whole)
    return [Sample({key: runs for key, runs in whole.items() if key[0] == one}, candidates) for one in targets]


def words(one: Candidate) -> str:
    """In what a candidate differs from the former defaults."""
    return changes(one, FORMER) or "former defaults"


def table(results: Results) -> str:
    """All candidates: the former defaults with their figures, the others as differences from them."""
    former = candidate({})
    rows = []
    for one in results.sample.candidates:
        cells = [words(one)]
        for name, digits in FIGURES.items():
            shown = results.sample.estimate(name, one)
            if one != former:
                shown = results.sample.difference(name, one, former)
            cells.append(percent(shown, digits))
        rows.append(cells)
    return markdown(["settings", *FIGURES], rows)


def write_page(results: Path, docs: Path) -> None:
    """Write the page from the records that are up to date; nothing while a round lacks a complete seed, or the former
    defaults."""
    records = Records(results / "defaults.jsonl")
    every = {model: suites(model) for model in SEEN}
    found = {model: {name: one.results(records) for name, one in each.items()} for model, each in every.items()}
    there = {
        name: {model: one for model in SEEN if (one := found[model][name]) is not None and has_former(one)}
        for name in ROUNDS
    }
    if any(len(each) < len(SEEN) for each in there.values()):
        return
    listed = [suite for each in every.values() for suite in each.values()]
    said = told_of(listed, records, [one for each in there.values() for one in each.values()])
    tables = {
        name: "\n\n".join(
            f"{model.capitalize()}, {', '.join(' to '.join(pair) for pair in one.comparison.pairs)}:\n\n{table(one)}"
            for model, one in each.items()
        )
        for name, each in there.items()
    }
    page = fill(
        "defaults.md",
        **said,
        chosen=words(choose(list(there["finalists"].values()))),
        tolerance=f"{100 * TOLERANCE:.0f}",
        **DRAWING,
        **tables,
    )
    write_text(docs / "defaults.md", page)


def has_former(results: Results) -> bool:
    """Whether the former defaults are among the candidates whose runs did not fail."""
    return candidate({}) in results.sample.candidates


if __name__ == "__main__":
    run(__doc__, "defaults", jobs, write_page)
