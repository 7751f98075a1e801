"""Methods against each other: closed form, training, training from the closed form, and robust ones; writes
docs/methods.md.

    python experiments/methods.py                 # resumes where it was stopped
    python experiments/methods.py --only steps/   # one suite

Takes about two hours of two cores, shared by ``--workers`` processes.

Three targets of the emoji pipeline, each towards a close neighbour, and two seeds. The suite "held" has every method
with and without searches for what still draws the target, with three divergences, and attacks every result. The suite
"steps" has trainings of several lengths, from the model as it is and from the closed form.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment import DRAWING, NOT_MEASURED, Suite, all_jobs, changed, fill, run, told_of

from fdu.comparison.front import Estimate, Sample
from fdu.comparison.page import COLOURS, Curve, curve_chart, markdown, percent, table
from fdu.comparison.plan import Candidate, Comparison
from fdu.comparison.results import Results
from fdu.comparison.sweep import Job, Records
from fdu.storage.output import write_text

MODEL, SEEDS = "emoji", (0, 1)
PAIRS = (("fox", "wolf"), ("orange", "lemon"), ("cat", "dog"))
DIVERGENCES = ("mse", "squared_hellinger", "pearson_chi2")
"""One that damps large errors, one that amplifies them, and the usual loss between them."""
PLAIN, WARM = "lora", "lora from the closed form"
WAYS: dict[str, dict[str, Any]] = {PLAIN: {}, WARM: {"init": "closed_form", "rank": 64}}
"""Ways to train: settings that differ from the defaults."""
ROUNDS = (0, 4)
"""Rounds of searches for what still draws the target."""
STEPS = {PLAIN: (20, 40, 80, 120), WARM: (10, 20, 40)}
"""Lengths of the trainings. From the closed form a third of the default is enough to tell whether it saves steps."""
COMPARED = ("erased", "retained", "attributes", "held")


def held(way: str, rounds: int, divergence: str) -> Candidate:
    """A training of the suite "held"."""
    searches = {"adversarial_rounds": rounds} if rounds else {}
    return changed({"divergence": divergence, **WAYS[way], **searches})


def computed(rounds: int) -> Candidate:
    """The closed form, with searches or without."""
    return changed({"train_method": "closed_form", **({"adversarial_rounds": rounds} if rounds else {})})


def of_length(way: str, divergence: str, steps: int) -> Candidate:
    """A training of the suite "steps"."""
    return changed({"divergence": divergence, **WAYS[way], "max_train_steps": steps})


def suites() -> dict[str, Suite]:
    """Both suites."""
    every = itertools.product(WAYS, ROUNDS, DIVERGENCES)
    candidates = {
        "held": (*map(computed, ROUNDS), *(held(*one) for one in every)),
        "steps": tuple(
            of_length(way, divergence, steps)
            for way, divergence in itertools.product(WAYS, DIVERGENCES)
            for steps in STEPS[way]
        ),
    }
    found = {}
    for name, chosen in candidates.items():
        attacked = name == "held"
        comparison = Comparison(MODEL, PAIRS, chosen, SEEDS, drawing=DRAWING[MODEL], attacked=attacked)
        found[name] = Suite(f"methods-{name}", comparison)
    return found


def jobs(cache: Path) -> list[Job]:
    """The jobs of both suites."""
    return all_jobs(list(suites().values()), cache)


def write_page(results: Path, docs: Path) -> None:
    """Write page and chart from the records that are up to date; nothing before one suite has a complete seed."""
    records = Records(results / "methods.jsonl")
    every = suites()
    found = {name: suite.results(records) for name, suite in every.items()}
    if not any(found.values()):
        return
    if found["steps"]:
        write_text(docs / "methods" / "steps.svg", curve_chart(curves(found["steps"]), "steps", LEFT).svg(whole=True))
    page = fill(
        "methods.md",
        **told_of(list(every.values()), records, list(found.values())),
        pairs=", ".join(f"{target} to {anchor}" for target, anchor in PAIRS),
        seeds=len(SEEDS),
        drawing=DRAWING[MODEL],
        rounds=max(ROUNDS),
        held=table(found["held"].standings).strip() if found["held"] else NOT_MEASURED,
        spreads=spreads(found["held"]) if found["held"] else NOT_MEASURED,
        curves="![What is left of the target against steps](methods/steps.svg)" if found["steps"] else NOT_MEASURED,
        steps=lengths(found["steps"]) if found["steps"] else NOT_MEASURED,
    )
    write_text(docs / "methods.md", page)


LEFT = "share of the target's images that show it (%)"


def spreads(results: Results) -> str:
    """For every way to train and each figure, the two divergences that differ most, and by how much."""
    rows = []
    for way, rounds in itertools.product(WAYS, ROUNDS):
        candidates = [held(way, rounds, divergence) for divergence in DIVERGENCES]
        cells = [widest(results.sample, name, candidates) for name in COMPARED]
        rows.append([f"{way}, {rounds} rounds" if rounds else way, *cells])
    return markdown(["", *COMPARED], rows)


def widest(sample: Sample, figure: str, candidates: Sequence[Candidate]) -> str:
    """The largest difference of a figure between two candidates, in percentage points."""
    pairs = itertools.permutations((one for one in candidates if one in sample.candidates), 2)
    found = [(sample.difference(figure, *pair), pair) for pair in pairs]
    if not found:
        return "-"
    gap, (one, other) = max(found, key=lambda entry: entry[0].value)
    certain = "" if gap.sign else "; may be chance"
    return f"{one.divergence} minus {other.divergence}: {percent(gap)}{certain}"


def curves(results: Results) -> list[Curve]:
    """What is left of the target against steps: one curve per divergence and way; dashed from the closed form."""
    found = []
    for way, (divergence, colour) in itertools.product(WAYS, zip(DIVERGENCES, COLOURS, strict=False)):
        points: list[tuple[float, Estimate]] = []
        for steps in STEPS[way]:
            one = of_length(way, divergence, steps)
            if one in results.sample.candidates:
                erased = results.sample.estimate("erased", one)
                points.append((steps, Estimate(1 - erased.value, 1 - erased.high, 1 - erased.low)))
        named = divergence if not WAYS[way] else f"{divergence}, from the closed form"
        found.append(Curve(named, points, colour, dashed=bool(WAYS[way])))
    return found


def lengths(results: Results) -> str:
    """For each divergence, the longest training from the model as it is, and the shortest from the closed form that
    does not clearly erase less."""
    sample, rows = results.sample, []
    for divergence in DIVERGENCES:
        plains = [of_length(PLAIN, divergence, steps) for steps in STEPS[PLAIN]]
        plains = [one for one in plains if one in sample.candidates]
        if not plains:
            continue
        plain = plains[-1]
        warm = [
            one
            for steps in STEPS[WARM]
            if (one := of_length(WARM, divergence, steps)) in sample.candidates
            and sample.difference("erased", one, plain).sign >= 0
        ]
        cells = ["never", "", "", ""]
        if warm:
            cells = [str(warm[0].settings["max_train_steps"]), *figures(sample, warm[0])]
        rows.append([divergence, str(plain.settings["max_train_steps"]), *figures(sample, plain), *cells])
    head = ["erased", "retained", "attributes"]
    return markdown(["divergence", "steps", *head, "steps from the closed form", *head], rows)


def figures(sample: Sample, one: Candidate) -> list[str]:
    """The figures of one candidate."""
    return [percent(sample.estimate(name, one)) for name in COMPARED[:3]]


if __name__ == "__main__":
    run(__doc__, "methods", jobs, write_page)
