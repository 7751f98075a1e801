"""Erase objects, superclasses and styles in every way there is, judge, and write docs/erasure.md.

    python experiments/erasure.py                    # resumes where it was stopped
    python experiments/erasure.py --only ways/       # one suite

Takes about two hours of two cores, shared by ``--workers`` processes.

Suites on the emoji pipeline: "neighbours" and "above" (an object of each kind, towards its closest neighbour and
towards its superclass), "wide" (superclasses), "styles" and "no style" (a style towards another and towards none), each
by training with the defaults and in closed form; and "ways" (what is trained, objectives, weightings, games). On the
digits pipeline, every digit and every ink with the defaults and in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import Suite, all_jobs, conditions, embedded, fill, of_total, run
from outcomes import FIGURES, Outcome, outcomes

from fdu.comparison.page import markdown, percent
from fdu.comparison.plan import Candidate, Comparison, Drawing
from fdu.comparison.results import Results
from fdu.comparison.sweep import Job, Records
from fdu.config import EraseConfig
from fdu.storage.output import write_text
from fdu.subjects.digits.vocabulary import DIGITS, INKS
from fdu.subjects.emoji.emoji_pipeline import ANY_STYLE, relatives
from fdu.subjects.emoji.objects import STYLES, THINGS, members

Pairs = tuple[tuple[str, str], ...]

OBJECTS = tuple(
    [one for one in members(kind) if one in THINGS][2].name
    for kind in dict.fromkeys(thing.superclasses[0] for thing in THINGS)
)
"""The third object of each narrow superclass: no choice of ours."""
PAIRS: dict[str, tuple[str, Pairs]] = {
    "neighbours": ("emoji", tuple((name, relatives(name)[0].name) for name in OBJECTS)),
    "above": ("emoji", tuple((name, next(t for t in THINGS if t.name == name).superclasses[0]) for name in OBJECTS)),
    "wide": ("emoji", (("bird", "mammal"), ("tree", "flower"), ("vegetable", "fruit"))),
    "styles": ("emoji", tuple(zip(STYLES, (*STYLES[1:], STYLES[0]), strict=True))),
    "no style": ("emoji", tuple((style, ANY_STYLE) for style in STYLES)),
    "ways": ("emoji", (("fox", "wolf"), ("strawberry", "fruit"))),
    "digits": ("digits", tuple(zip(DIGITS, (*DIGITS[1:], DIGITS[0]), strict=True))),
    "digits above": ("digits", tuple((digit, "digit") for digit in DIGITS)),
    "inks": ("digits", tuple(zip(INKS, (*INKS[1:], INKS[0]), strict=True))),
}
"""By suite, the pipeline, and targets with their anchors."""
DEFAULT = Candidate(EraseConfig().divergence)
COMPUTED = Candidate(EraseConfig().divergence, others=(("train_method", "closed_form"),))
WAYS: tuple[tuple[str, tuple[dict[str, Any], ...]], ...] = (
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
SEEDS = {"ways": (0, 1, 2)}
"""Of the suites with more seeds than one."""
DRAWING = {
    "emoji": Drawing(images_per_class=8, images_of_target=40, num_inference_steps=12, guidance_scale=2.0),
    "digits": Drawing(images_per_class=16, images_of_target=48, num_inference_steps=12),
}
LEFT, KEPT, ASKED = 0.05, 0.95, 0.9
"""The bounds: the largest share of the target's images that still show it, beyond the share by chance where the anchor
includes the target; the smallest share of near classes, relative to that of all other classes before; the smallest
share of attributes, relative to that before."""
NOT_MEASURED = "Not measured yet."


def candidate(changes: Mapping[str, Any]) -> Candidate:
    """The defaults with these settings changed."""
    others = dict(changes)
    return Candidate(others.pop("divergence", EraseConfig().divergence), others=tuple(others.items()))


def suites() -> dict[str, Suite]:
    """All suites."""
    found = {}
    for name, (model, pairs) in PAIRS.items():
        ways = [candidate(one) for _, changes in WAYS for one in changes]
        candidates = tuple(ways) if name == "ways" else (DEFAULT, COMPUTED)
        comparison = Comparison(model, pairs, candidates, SEEDS.get(name, (0,)), drawing=DRAWING[model])
        found[name] = Suite(name, comparison)
    return found


def jobs(cache: Path) -> list[Job]:
    """The jobs of all suites."""
    return all_jobs(list(suites().values()), cache)


def write_page(results: Path, docs: Path) -> None:
    """Write the page from the records that are up to date; nothing before one suite has a complete seed."""
    records = Records(results / "erasure.jsonl")
    found = {name: suite.results(records) for name, suite in suites().items()}
    there = [one for one in found.values() if one is not None]
    if not there:
        return
    everything = [job for job in jobs(Path()) if not job.first]
    made = sum(records.of(job.name, job.identity) is not None for job in everything)
    default = EraseConfig().as_dict()
    shown = ("divergence", "s0", "rank", "max_train_steps", "train_batch_size", "learning_rate", "preservation_weight")
    page = fill(
        "erasure.md",
        made=of_total(made, len(everything)),
        **conditions(there[0].conditions),
        settings=", ".join(f"{name} {default[name]}" for name in shown),
        drawing=DRAWING["emoji"],
        digits_drawing=DRAWING["digits"],
        left=f"{100 * LEFT:.0f}",
        kept=f"{100 * KEPT:.0f}",
        asked=f"{100 * ASKED:.0f}",
        bounds=bounds(found),
        ways=ways(found["ways"]),
        **{name.replace(" ", "_"): targets(found[name]) for name in PAIRS if name != "ways"},
    )
    write_text(docs / "erasure.md", page)


def way(one: Candidate) -> str:
    """In what a candidate differs from the defaults."""
    others = [f"{name} {value}" if value is not True else name for name, value in one.others]
    named = [one.divergence] if one.divergence != DEFAULT.divergence else []
    return ", ".join([*others, *named]) or "defaults"


def targets(results: Results | None) -> str:
    """One row per target and candidate."""
    if results is None:
        return NOT_MEASURED
    anchors = dict(results.comparison.pairs)
    rows = [
        [target, anchors[target], way(one), *own.cells(one)]
        for target, own in outcomes(results).items()
        for one in own.candidates
    ]
    return markdown(["target", "anchor", "by", *FIGURES], rows)


def ways(results: Results | None) -> str:
    """One table per heading, with the means over targets."""
    if results is None:
        return NOT_MEASURED
    figures = {"erased": 1, "retained": 1, "attributes": 1, "change": 2}
    parts = []
    for heading, changes in WAYS:
        own = [candidate({}), *(candidate(each) for each in changes if each)]
        rows = [
            [way(one), *(percent(results.sample.estimate(name, one), digits) for name, digits in figures.items())]
            for one in own
            if one in results.sample.candidates
        ]
        parts.append(f"### {heading.capitalize()}\n\n{markdown(['settings', *figures], rows)}")
    return "\n\n".join(parts)


def bounds(found: Mapping[str, Results | None]) -> str:
    """How many targets of each suite keep each bound, and which do not, for the defaults and the closed form."""
    rows = []
    for name, results in found.items():
        if results is None or name == "ways":
            continue
        for one in results.sample.candidates:
            broken = {target: broke(results, own, target, one) for target, own in outcomes(results).items()}
            cells = []
            for place in range(3):
                bad = [f"{target} {value[place]}" for target, value in broken.items() if value[place]]
                cells.append(f"{len(broken) - len(bad)} of {len(broken)}" + (f"; not {', '.join(bad)}" if bad else ""))
            rows.append([name, way(one), *cells])
    return markdown(["suite", "by", "target erased", "near kept", "attributes kept"], rows)


def broke(results: Results, own: Outcome, target: str, one: Candidate) -> Sequence[str]:
    """For each bound, the figure in percent where a candidate breaks it, otherwise ""."""
    anchor = dict(results.comparison.pairs)[target]
    chance = embedded(results.comparison.model).content.chance(target, anchor)
    left = 1 - own.all.estimate("erased", one).value
    near, attributes = own.estimate("near", one).value, own.estimate("attributes", one).value
    _, others_before, asked_before = results.before[target]
    return (
        "" if left <= LEFT + chance else f"{100 * left:.1f}",
        "" if near >= KEPT * others_before else f"{100 * near:.1f}",
        "" if not attributes < ASKED * asked_before else f"{100 * attributes:.1f}",
    )


if __name__ == "__main__":
    run(__doc__, "erasure", jobs, write_page)
