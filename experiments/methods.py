"""Methods against each other: closed form, training, training from the closed form, and robust ones; writes
docs/methods.md.

    python experiments/methods.py                 # resumes where it was stopped
    python experiments/methods.py --only steps/   # one suite

Takes about two hours of two cores, shared by ``--workers`` processes.

Three targets of the emoji pipeline, each towards a close neighbour, and two seeds. The suite "held" has every method
with and without searches for what still draws the target, with three divergences, and attacks every result. The suite
"steps" has trainings of several lengths, from the model as it is and from the closed form, and the closed form alone.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from experiment import DRAWING, NOT_MEASURED, Suite, all_jobs, changed, fill, run, told_of
from outcomes import ASKED, KEPT, LEFT, bounds, compared, outcomes

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
ONE, OTHER = "squared_hellinger", "pearson_chi2"
"""The two divergences that differ most: one damps large errors, one amplifies them."""
AS_GOOD = 0.02
"""A training is as good as another if it is at most this much worse in erased, retained and attributes."""


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
        "steps": (
            computed(0),
            *(
                of_length(way, divergence, steps)
                for way, divergence in itertools.product(WAYS, DIVERGENCES)
                for steps in STEPS[way]
            ),
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
        write_text(docs / "methods" / "steps.svg", curve_chart(curves(found["steps"]), "steps", LABEL).svg(whole=True))
    became = {"held": outcomes(every["held"], records, found["held"])}
    page = fill(
        "methods.md",
        **told_of(list(every.values()), records, list(found.values())),
        pairs=", ".join(f"{target} to {anchor}" for target, anchor in PAIRS),
        seeds=len(SEEDS),
        drawing=DRAWING[MODEL],
        rounds=max(ROUNDS),
        held=f"{table(found['held'].standings).strip()}\n\n{compared(found['held'])}".strip()
        if found["held"]
        else NOT_MEASURED,
        winners=winners(found["held"]) if found["held"] else NOT_MEASURED,
        bounds=bounds(became) if found["held"] else NOT_MEASURED,
        left=f"{100 * LEFT:.0f}",
        kept=f"{100 * KEPT:.0f}",
        asked=f"{100 * ASKED:.0f}",
        one=ONE,
        other=OTHER,
        gaps=gaps(found["held"]) if found["held"] else NOT_MEASURED,
        as_good=f"{100 * AS_GOOD:.0f}",
        curves="![What is left of the target against steps](methods/steps.svg)" if found["steps"] else NOT_MEASURED,
        steps=lengths(found["steps"]) if found["steps"] else NOT_MEASURED,
    )
    write_text(docs / "methods.md", page)


LABEL = "share of the target's images that show it (%)"


def told(results: Path) -> str:
    """What results.md says of the records in a folder: which method wins, and where the divergence matters."""
    found = suites()["held"].results(Records(results / "methods.jsonl"))
    if not found:
        return "Methods are not measured yet."
    return f"""Closed form, training, warm start and searches for what still draws the target, on {len(PAIRS)} targets
([methods.md](methods.md)). By what one prefers:

{winners(found)}

{ONE} minus {OTHER}, in percentage points, for every way to train, and by how much that gap differs from the gap of
`{PLAIN}`. *Held*: share of the target's images that do not show it under an attack.

{gaps(found)}"""


def winners(results: Results) -> str:
    """Which method each preference recommends."""
    return "\n".join(f"* {prefer}: {one.headline}." for prefer, one in results.recommendations.items())


def gaps(results: Results) -> str:
    """By how much two divergences differ, for every way to train, and whether the gap is another one after a warm start
    or with searches."""
    sample, weights = results.sample, {}
    for name, rounds in itertools.product(WAYS, ROUNDS):
        label = f"{name}, {rounds} rounds" if rounds else name
        weights[label] = [(held(name, rounds, ONE), 1.0), (held(name, rounds, OTHER), -1.0)]
    usual, *others = weights
    for label in others:
        more = [*weights[label], *((one, -weight) for one, weight in weights[usual])]
        weights[f"{label}, minus {usual}"] = more
    known = {label: own for label, own in weights.items() if all(one in sample.candidates for one, _ in own)}
    rows = [[label, *(_certain(sample.contrast(name, own)) for name in COMPARED)] for label, own in known.items()]
    return markdown(["", *COMPARED], rows)


def _certain(gap: Estimate) -> str:
    """A difference, marked if chance may explain it."""
    return percent(gap) + ("" if gap.sign else ", may be chance")


def curves(results: Results) -> list[Curve]:
    """What is left of the target against steps: one curve per divergence and way; dashed from the closed form."""
    found = []
    for name, (divergence, colour) in itertools.product(WAYS, zip(DIVERGENCES, COLOURS, strict=False)):
        points: list[tuple[float, Estimate]] = []
        for steps in STEPS[name]:
            one = of_length(name, divergence, steps)
            if one in results.sample.candidates:
                erased = results.sample.estimate("erased", one)
                points.append((steps, Estimate(1 - erased.value, 1 - erased.high, 1 - erased.low)))
        named = divergence if not WAYS[name] else f"{divergence}, from the closed form"
        found.append(Curve(named, points, colour, dashed=bool(WAYS[name])))
    return found


def lengths(results: Results) -> str:
    """For each divergence the longest training from the model as it is, and of both ways the shortest one that is as
    good; before them the closed form alone."""
    sample, rows = results.sample, []
    if computed(0) in sample.candidates:
        rows.append(["", "closed form alone", "0", *figures(sample, computed(0)), ""])
    for divergence in DIVERGENCES:
        longest = of_length(PLAIN, divergence, STEPS[PLAIN][-1])
        if longest not in sample.candidates:
            continue
        rows.append([divergence, PLAIN, str(STEPS[PLAIN][-1]), *figures(sample, longest), ""])
        for name, counts in STEPS.items():
            every = [of_length(name, divergence, steps) for steps in counts]
            good = [one for one in every if one in sample.candidates and as_good(sample, one, longest)]
            if not good:
                rows.append([divergence, name, f"not in {counts[-1]}", *figures(sample, every[-1]), ""])
            elif good[0] != longest:
                gap = _certain(sample.difference("erased", good[0], longest))
                steps = str(good[0].settings["max_train_steps"])
                rows.append([divergence, name, steps, *figures(sample, good[0]), gap])
    return markdown(["divergence", "training", "steps", *COMPARED[:3], "erased, minus the longest"], rows)


def as_good(sample: Sample, one: Candidate, than: Candidate) -> bool:
    """Whether a candidate is at most ``AS_GOOD`` worse in all figures."""
    gaps = (sample.difference(name, one, than).value for name in COMPARED[:3])
    return all(math.isnan(gap) or gap >= -AS_GOOD for gap in gaps)


def figures(sample: Sample, one: Candidate) -> list[str]:
    """The figures of one candidate."""
    return [percent(sample.estimate(name, one)) for name in COMPARED[:3]] if one in sample.candidates else [""] * 3


if __name__ == "__main__":
    run(__doc__, "methods", jobs, write_page)
