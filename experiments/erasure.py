"""Erase objects, superclasses and styles in every way there is, judge, and write docs/erasure.md.

    python experiments/erasure.py                    # resumes where it was stopped
    python experiments/erasure.py --only ways/       # one suite

Takes about two hours of two cores, shared by ``--workers`` processes.

Suites on the emoji pipeline: "neighbours" and "above" (an object of each kind, towards its closest neighbour and
towards its superclass), "wide" (superclasses), "styles" and "no style" (a style towards another and towards none), each
by training with the defaults and in closed form; "ways" (what is trained, objectives, weightings, games); and
"attributes" (what keeps more of what else the prompts ask for). On the digits pipeline, every digit and every ink with
the defaults and in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from experiment import DRAWING, FIGURES, NOT_MEASURED, Suite, all_jobs, changed, fill, run, told_of
from outcomes import ASKED, COLUMNS, KEPT, LEFT, Outcome, bounds, outcomes, way

from fdu.comparison.page import markdown, percent
from fdu.comparison.plan import Candidate, Comparison
from fdu.comparison.results import Results
from fdu.comparison.sweep import Job, Records
from fdu.config import EraseConfig
from fdu.storage.output import write_text
from fdu.subjects.digits.vocabulary import DIGITS, INKS
from fdu.subjects.emoji.emoji_pipeline import ANY_STYLE, relatives
from fdu.subjects.emoji.objects import STYLES, THINGS, members

Pairs = tuple[tuple[str, str], ...]
Ways = tuple[tuple[str, tuple[dict[str, Any], ...]], ...]

OBJECTS = tuple(members(kind)[2].name for kind in dict.fromkeys(thing.superclasses[0] for thing in THINGS))
"""The third object of each narrow superclass: no choice of ours."""
PAIRS: dict[str, tuple[str, Pairs]] = {
    "neighbours": ("emoji", tuple((name, relatives(name)[0].name) for name in OBJECTS)),
    "above": ("emoji", tuple((name, next(t for t in THINGS if t.name == name).superclasses[0]) for name in OBJECTS)),
    "wide": ("emoji", (("bird", "mammal"), ("tree", "flower"), ("vegetable", "fruit"))),
    "styles": ("emoji", tuple(zip(STYLES, (*STYLES[1:], STYLES[0]), strict=True))),
    "no style": ("emoji", tuple((style, ANY_STYLE) for style in STYLES)),
    "ways": ("emoji", (("fox", "wolf"), ("strawberry", "fruit"))),
    "attributes": ("emoji", (("caterpillar", "butterfly"), ("owl", "bird"), ("banana", "fruit"))),
    "digits": ("digits", tuple(zip(DIGITS, (*DIGITS[1:], DIGITS[0]), strict=True))),
    "digits above": ("digits", tuple((digit, "digit") for digit in DIGITS)),
    "inks": ("digits", tuple(zip(INKS, (*INKS[1:], INKS[0]), strict=True))),
}
"""By suite, the pipeline, and targets with their anchors."""
DEFAULT, COMPUTED = changed({}), changed({"train_method": "closed_form"})
WAYS: Ways = (
    ("what is trained", (
        {},
        {"adapter_layers": "attention"},
        {"train_method": "dora"},
        {"train_method": "cross_attention"},
        {"train_method": "attention"},
        {"train_method": "full"},
        {"train_method": "text_encoder"},
        {"train_method": "token"},
        {"train_method": "closed_form"},
        {"init": "closed_form", "rank": 64},
    )),
    ("objectives", ({"objective": "noise"}, {"negative_guidance": 1.0})),
    ("variational", tuple(
        {"variational": True, "divergence": name} for name in ("jensen_shannon", "kl", "squared_hellinger")
    )),
    ("when to stop", (
        {"stop_at": 0.2},
        {"stop_at": 0.1},
        {"stop_at": 0.05},
        {"init": "closed_form", "rank": 64, "stop_at": 0.1},
        {"init": "closed_form", "rank": 64, "stop_at": 0.05},
    )),
    ("samples and weights", (
        {"weighting": "posterior"},
        {"weighting": "min_snr"},
        {"weighting": "p2"},
        {"timestep_sampling": "importance"},
        {"gradient_surgery": True},
        {"frozen_batches": 40},
    )),
)  # fmt: skip
"""Changes of the default settings, by the heading of their table."""
KEEPING: tuple[dict[str, Any], ...] = (
    {},
    {"max_train_steps": 240},
    {"preservation_weight": 2.0},
    {"preservation_weight": 8.0},
    {"learning_rate": 0.008},
)
"""What may keep more of the attributes: changes of the default settings."""
MEANS = {"ways": tuple(one for _, settings in WAYS for one in settings), "attributes": KEEPING}
"""The changes of suites whose figures are means over targets."""
SEEDS = {"ways": (0, 1), "attributes": (0, 1)}
"""Of the suites with more seeds than one."""


def suites() -> dict[str, Suite]:
    """All suites."""
    found = {}
    for name, (model, pairs) in PAIRS.items():
        candidates = tuple(map(changed, MEANS[name])) if name in MEANS else (DEFAULT, COMPUTED)
        comparison = Comparison(model, pairs, candidates, SEEDS.get(name, (0,)), drawing=DRAWING[model])
        found[name] = Suite(name, comparison)
    return found


def jobs(cache: Path) -> list[Job]:
    """The jobs of all suites."""
    return all_jobs(list(suites().values()), cache)


def write_page(results: Path, docs: Path) -> None:
    """Write the page from the records that are up to date; nothing before one suite has a complete seed."""
    records = Records(results / "erasure.jsonl")
    every = suites()
    found = {name: suite.results(records) for name, suite in every.items()}
    if not any(found.values()):
        return
    became = {name: outcomes(suite, records, found[name]) for name, suite in every.items() if name not in MEANS}
    default = EraseConfig().as_dict()
    shown = ("divergence", "s0", "rank", "max_train_steps", "train_batch_size", "learning_rate", "preservation_weight")
    page = fill(
        "erasure.md",
        **told_of(list(every.values()), records, list(found.values())),
        settings=", ".join(f"{name} {default[name]}" for name in shown),
        drawing=DRAWING["emoji"],
        digits_drawing=DRAWING["digits"],
        left=f"{100 * LEFT:.0f}",
        kept=f"{100 * KEPT:.0f}",
        asked=f"{100 * ASKED:.0f}",
        bounds=bounds(became),
        ways=means(found["ways"], every["ways"].current(records), WAYS),
        asked_for=means(found["attributes"], every["attributes"].current(records), (("", KEEPING),)),
        **{name.replace(" ", "_"): targets(own) for name, own in became.items()},
    )
    write_text(docs / "erasure.md", page)


def targets(became: Mapping[str, Outcome]) -> str:
    """One row per target and candidate, and one for the model as it is."""
    rows = []
    for target, own in became.items():
        rows.append([target, own.anchor, "not erased", *own.cells_before])
        rows += [[target, own.anchor, way(one), *own.cells(one)] for one in own.candidates]
    return markdown(["target", "anchor", "by", *COLUMNS], rows) if rows else NOT_MEASURED


def means(results: Results | None, records: Records, ways: Ways) -> str:
    """One table per heading, with the means over targets and the mean number of steps."""
    if results is None:
        return NOT_MEASURED
    parts = []
    for heading, settings in ways:
        rows = [
            [
                way(one),
                steps(results, records, one),
                *(percent(results.sample.estimate(name, one), digits) for name, digits in FIGURES.items()),
            ]
            for one in (DEFAULT, *(changed(each) for each in settings if each))
            if one in results.sample.candidates
        ]
        above = f"### {heading.capitalize()}\n\n" if heading else ""
        parts.append(above + markdown(["settings", "steps", *FIGURES], rows))
    return "\n\n".join(parts)


def steps(results: Results, records: Records, one: Candidate) -> str:
    """The mean number of steps of a candidate's runs."""
    names = [run.name for run in results.comparison.runs() if run.candidate == one and run.name in records.found]
    return f"{fmean(len(records.found[name].get('distance', '').split()) for name in names):.0f}"


if __name__ == "__main__":
    run(__doc__, "erasure", jobs, write_page)
