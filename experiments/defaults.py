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

from experiment import Suite, all_jobs, conditions, fill, of_total, run

from fdu.comparison.front import Sample
from fdu.comparison.page import markdown, percent
from fdu.comparison.plan import Candidate, Comparison, Drawing
from fdu.comparison.results import Results
from fdu.comparison.sweep import Job, Records
from fdu.config import EraseConfig
from fdu.storage.output import write_text

FORMER: dict[str, Any] = {"learning_rate": 2e-3, "preservation_weight": 1.0}
"""The settings whose defaults changed, as they were."""
CHOSEN: dict[str, Any] = {"learning_rate": 4e-3, "preservation_weight": 2.0}
"""What the rule chooses from the finalists."""
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
    CHOSEN,
    {"learning_rate": 4e-3, "preservation_weight": 4.0},
    {"s0": 10.0},
)
SEEDS = (0, 1, 2)
SEEN = {"emoji": (("fox", "wolf"), ("strawberry", "fruit")), "digits": (("seven", "digit"), ("red", "green"))}
HELD_OUT = {
    "emoji": (("turtle", "crocodile"), ("banana", "fruit"), ("fluent", "noto")),
    "digits": (("nine", "digit"), ("blue", "black")),
}
"""By pipeline, targets and anchors of the first two rounds, and of the confirmation."""
DRAWING = {
    "emoji": Drawing(images_per_class=8, images_of_target=40, num_inference_steps=12, guidance_scale=2.0),
    "digits": Drawing(images_per_class=16, images_of_target=48, num_inference_steps=12),
}
TOLERANCE = 0.02
"""The rule: how much less of a target, as a share of its images, a candidate may erase than the former defaults."""
FIGURES = {"erased": 1, "retained": 1, "attributes": 1, "change": 2}
"""The figures of the tables, with their decimals in percent."""
ROUNDS = ("screening", "finalists", "confirmation")


def candidate(changes: Mapping[str, Any]) -> Candidate:
    """The former defaults with these settings changed."""
    settings = {**FORMER, **changes}
    divergence, s0 = (settings.pop(name, getattr(EraseConfig(), name)) for name in ("divergence", "s0"))
    return Candidate(divergence, s0, tuple(settings.items()))


def suites(model: str) -> dict[str, Suite]:
    """The rounds on a pipeline. The first two share their runs with the first seed."""
    former = candidate({})

    def suite(pairs: Sequence[tuple[str, str]], changes: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> Suite:
        competing = (former, *map(candidate, changes))
        return Suite(model, Comparison(model, tuple(pairs), competing, tuple(seeds), drawing=DRAWING[model]))

    found = (
        suite(SEEN[model], CHANGES, SEEDS[:1]),
        suite(SEEN[model], FINALISTS, SEEDS),
        suite(HELD_OUT[model], (CHOSEN,), SEEDS),
    )
    return dict(zip(ROUNDS, found, strict=True))


def jobs(cache: Path) -> list[Job]:
    """The jobs of all rounds on both pipelines, round by round."""
    both = [suites(model) for model in SEEN]
    return all_jobs([one[name] for name in ROUNDS for one in both], cache)


def choose(by_model: Sequence[Results]) -> Candidate:
    """The finalist that the rule chooses from the results of all pipelines.

    Of the candidates that erase as much of every target as the former defaults, up to ``TOLERANCE``, those keep most of
    what else the prompts ask for whose difference to the best may be chance. The one of them that changes the images of
    other classes least is chosen.
    """
    former = candidate({})
    targets = [each for results in by_model for each in by_target(results)]
    able = [
        one
        for one in by_model[0].sample.candidates
        if all(each.difference("erased", one, former).value >= -TOLERANCE for each in targets)
    ]
    mean = {one: sum(total(each.sample, "attributes", one) for each in by_model) for one in able}
    best = max(able, key=lambda one: mean[one])
    tied = [one for one in able if all(each.sample.difference("attributes", one, best).sign >= 0 for each in by_model)]
    return min(tied, key=lambda one: sum(total(each.sample, "change", one) for each in by_model))


def by_target(results: Results) -> list[Sample]:
    """The sample of each target alone."""
    targets = dict.fromkeys(target for target, _, _ in results.runs)
    candidates = results.sample.candidates
    return [
        Sample({key: runs for key, runs in results.runs.items() if key[0] == one and key[1] in candidates}, candidates)
        for one in targets
    ]


def total(sample: Sample, figure: str, one: Candidate) -> float:
    """A figure of a candidate."""
    return sample.estimate(figure, one).value


def words(one: Candidate) -> str:
    """In what a candidate differs from the former defaults."""
    default = EraseConfig()
    usual = {**FORMER, "divergence": default.divergence, "s0": default.s0}
    changed = [f"{name} {value}" for name, value in one.settings.items() if usual.get(name) != value]
    return ", ".join(changed) or "former defaults"


def table(results: Results) -> str:
    """All candidates: the former defaults with their figures, the others as differences to them."""
    former = candidate({})
    rows = []
    for one in results.sample.candidates:
        shown = (
            results.sample.estimate(name, one) if one == former else results.sample.difference(name, one, former)
            for name in FIGURES
        )
        rows.append(
            [words(one), *(percent(each, digits) for each, digits in zip(shown, FIGURES.values(), strict=True))]
        )
    return markdown(["settings", *FIGURES], rows)


def write_page(results: Path, docs: Path) -> None:
    """Write the page from the records that are up to date; nothing while a round lacks a complete seed."""
    records = Records(results / "defaults.jsonl")
    found = {model: {name: one.results(records) for name, one in suites(model).items()} for model in SEEN}
    made = {f"{model}, {name}": each for model, rounds in found.items() for name, each in rounds.items()}
    there = [each for each in made.values() if each is not None]
    if len(there) < len(made):
        return
    everything = jobs(Path())
    runs = {job.name for job in everything if not job.first}
    current = {job.name for job in everything if records.of(job.name, job.identity) is not None}
    chosen = choose([each for name, each in made.items() if each is not None and name.endswith(ROUNDS[1])])
    page = fill(
        "defaults.md",
        made=of_total(len(runs & current), len(runs)),
        **conditions(there[0].conditions),
        chosen=words(chosen),
        now=words(candidate(CHOSEN)),
        tolerance=f"{100 * TOLERANCE:.0f}",
        drawing="; ".join(
            f"on the {model} pipeline {one.images_of_target} images of the target in phrasings of the training, as "
            f"many in other phrasings, {one.images_per_class} of each other class"
            for model, one in DRAWING.items()
        ),
        steps=DRAWING["emoji"].num_inference_steps,
        **{
            name: "\n\n".join(
                f"{model.capitalize()}, {', '.join(' to '.join(pair) for pair in pairs(model, name))}:\n\n"
                + table(made[f"{model}, {name}"])  # type: ignore[arg-type]
                for model in SEEN
            )
            for name in ROUNDS
        },
    )
    write_text(docs / "defaults.md", page)


def pairs(model: str, name: str) -> Sequence[tuple[str, str]]:
    """Targets and anchors of a round."""
    return suites(model)[name].comparison.pairs


if __name__ == "__main__":
    run(__doc__, "defaults", jobs, write_page)
