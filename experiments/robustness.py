"""Which erasures hold? Erase "fox" in several ways, examine each result, and write docs/robustness.md.

    python experiments/robustness.py                  # resumes where it was stopped
    python experiments/robustness.py --only orange/   # one of the other targets

Takes about two hours of two cores, shared by ``--workers`` processes. The rows "never known" need the network, for
real emoji, and resvg-py.

Some erasures are repeated with other targets and seeds. Three rows are not erasures. "not erased" shows the figures of
the pipeline as it is. For "never known", the attack and relearning ask that pipeline for an object that it has never
seen, with real emoji of it. These rows show how much a perturbation or fine-tuning can teach where an erasure left
nothing behind.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from experiment import HERE, NOT_MEASURED, conditions, current, dated, fill, of_total, run, student

import fdu
from fdu.comparison.page import markdown
from fdu.comparison.runs import weights
from fdu.comparison.sweep import Job, Record, settings_identity
from fdu.evaluation import draw
from fdu.evaluation.intervals import wilson
from fdu.evaluation.robustness import AttackConfig, Examination, JudgedSampling, attack
from fdu.evaluation.robustness.holding import OTHERS, judge_robustness
from fdu.evaluation.robustness.image_attacks import ImageAttackConfig, from_partial_noise, inpainting
from fdu.evaluation.robustness.phrasings import packaged_sets
from fdu.evaluation.robustness.relearning import (
    BACK,
    AttackOutcome,
    InversionConfig,
    Lesson,
    RelearningConfig,
    invert,
    relearn,
)
from fdu.evaluation.robustness.word_attacks import (
    DirectionConfig,
    FoundWords,
    WordSearchConfig,
    bred_words,
    search_words,
)
from fdu.evaluation.verdict import ERASED_BELOW, percent
from fdu.models.families import denoiser_of
from fdu.storage.output import write_text
from fdu.subjects.emoji import emoji_pipeline
from fdu.subjects.emoji.drawings import PACKAGES, fetch_packages, load_drawings, on_backgrounds
from fdu.subjects.emoji.objects import ALL_THINGS, BACKGROUNDS, STYLES

MODEL = "emoji"


@dataclasses.dataclass(frozen=True)
class Aim:
    """What is erased, and towards what."""

    target: str
    anchor: str
    """A close neighbour."""
    superclass: str


FOX = Aim("fox", "wolf", "mammal")
AIMS = {one.target: one for one in (FOX, Aim("orange", "lemon", "fruit"), Aim("cat", "dog", "mammal"))}
UNKNOWN = {"zebra": FOX, "koala": FOX, "pineapple": AIMS["orange"]}
"""Objects that only the judge has seen, and the target whose prompts are asked for their superclass."""
SEEDS = (0, 1)
DRAWING = JudgedSampling(images=32, num_inference_steps=12, guidance_scale=2.0)
LATENTS = 32
KEPT_IMAGES, KEPT_SEED = 8, 1000
"""Images of each retained class, and the seed of the first."""
ERASURES: dict[str, dict[str, Any]] = {
    "closed_form": {"train_method": "closed_form"},
    "lora": {},
    "lora, 4 rounds": {"adversarial_rounds": 4},
    "closed_form, 4 rounds": {"train_method": "closed_form", "adversarial_rounds": 4},
    "lora, 4 rounds, alternating": {"adversarial_rounds": 4, "adversarial_order": "alternate"},
    "full": {"train_method": "full"},
    "full, 4 rounds": {"train_method": "full", "adversarial_rounds": 4},
    "token": {"train_method": "token"},
    "text_encoder": {"train_method": "text_encoder"},
    "cross_attention": {"train_method": "cross_attention"},
    "lora from the closed form": {"init": "closed_form", "rank": 64},
    "full, 480 steps": {"train_method": "full", "max_train_steps": 480},
    "lora towards the superclass": {},
    "full, 4 rounds, alternating": {
        "train_method": "full",
        "adversarial_rounds": 4,
        "adversarial_order": "alternate",
    },
    "full, 8 rounds, alternating, 480 steps": {
        "train_method": "full",
        "adversarial_rounds": 8,
        "adversarial_order": "alternate",
        "max_train_steps": 480,
    },
    "closed_form, 12 rounds": {"train_method": "closed_form", "adversarial_rounds": 12},
    "full from the closed form, 4 rounds": {
        "train_method": "full",
        "init": "closed_form",
        "adversarial_rounds": 4,
    },
    "full from the closed form, 4 rounds, alternating": {
        "train_method": "full",
        "init": "closed_form",
        "adversarial_rounds": 4,
        "adversarial_order": "alternate",
    },
}
"""Erasures of the fox: settings that differ from the defaults, by name."""
TO_SUPERCLASS = ("lora towards the superclass",)
"""Those towards the superclass; all others are towards the neighbour."""
REPEATED = ("closed_form", "lora", "closed_form, 4 rounds", "lora, 4 rounds", "full, 4 rounds, alternating")
"""Those that are made with every target and seed."""
OTHER_CONFIGS = (WordSearchConfig, DirectionConfig, InversionConfig, ImageAttackConfig)
NOT_ERASED, NEVER_KNOWN, KEPT_BEFORE = "not erased", "never known: {}", "kept before: {} to {}"
HELD_OUT = ("words", "inversion", "partial_noise", "inpainting")
"""Attacks that no erasure is trained on and that "never known" has, too."""
PLAIN = "lora"
"""The erasure whose steps of relearning are the unit of the others'."""
MARGIN, KEPT, TIMES = 0.1, 0.95, 3
"""The goals: what an attack may reach above "never known", what is retained of before, steps of relearning."""
Rows = Mapping[str, Record]


@dataclasses.dataclass(frozen=True)
class Row:
    """An erasure, or the pipeline as it is, to be examined."""

    erasure: str
    """A name in ``ERASURES``, or ``NOT_ERASED``."""
    aim: Aim = FOX
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its record."""
        if (self.aim, self.seed) == (FOX, 0):
            return self.erasure
        return f"{self.aim.target}/{self.erasure}" + (f", seed {self.seed}" if self.erasure in ERASURES else "")

    @property
    def anchor(self) -> str:
        """The anchor of the erasure; of the pipeline as it is, that of all others."""
        return self.aim.superclass if self.erasure in TO_SUPERCLASS else self.aim.anchor

    @property
    def config(self) -> fdu.EraseConfig:
        """All settings of the erasure."""
        preserved = emoji_pipeline.preserved(self.aim.target, anchors=[self.anchor])
        return fdu.EraseConfig(
            **{"preservation_prompts": preserved, "seed": self.seed, **ERASURES[self.erasure]},
        )


def rows() -> list[Row]:
    """All rows but those of what was never known, in the order of the tables."""
    found = [Row(NOT_ERASED, aim) for aim in AIMS.values()] + [Row(name) for name in ERASURES]
    repeated = (Row(name, aim, seed) for name, aim, seed in itertools.product(REPEATED, AIMS.values(), SEEDS))
    return list(dict.fromkeys([*found, *repeated]))


def jobs(cache: Path) -> list[Job]:
    """One job per row."""
    shared = {
        "weights": weights(MODEL),
        "drawing": dataclasses.asdict(DRAWING),
        "latents": LATENTS,
        "attack": dataclasses.asdict(AttackConfig()),
        "relearning": dataclasses.asdict(RelearningConfig()),
        "others": [dataclasses.asdict(one()) for one in OTHER_CONFIGS],
        "kept": [KEPT_IMAGES, KEPT_SEED],
    }
    found = []
    for row in rows():
        identity = {**shared, "target": row.aim.target, "settings": {}}
        if row.erasure in ERASURES:
            identity |= {"anchor": row.anchor, "settings": settings_identity(row.config)}
        job = Job(row.name, identity, functools.partial(examine, row))
        sets = packaged_sets("emoji", row.aim.target)
        found.append(dated(job, (row.aim.target, row.anchor), model=MODEL, phrasings=sets))
    for pair in dict.fromkeys((row.aim.target, row.anchor) for row in rows()):
        identity = {name: shared[name] for name in ("weights", "drawing", "kept")}
        identity |= {"target": pair[0], "anchor": pair[1]}
        job = Job(KEPT_BEFORE.format(*pair), identity, functools.partial(examine_kept, *pair))
        found.append(dated(job, pair, model=MODEL))
    sets = packaged_sets("emoji", FOX.target)
    for name, aim in UNKNOWN.items():
        packages = [package.sha256 for package in PACKAGES.values()]
        asked = {"unknown": name, "anchor": aim.superclass, "packages": packages}
        identity = {**shared, "target": aim.target, "settings": {}, **asked}
        job = Job(NEVER_KNOWN.format(name), identity, functools.partial(examine_unknown, name))
        found.append(dated(job, (aim.target, aim.superclass), model=MODEL, phrasings=sets))
    return found


def examine(row: Row) -> Record:
    """Erase, and examine the result."""
    pipeline, target = fdu.load_pipeline(MODEL), row.aim.target
    # The further attacks on the pipeline before the erasure are those of the row "not erased".
    begun, bred = before(target, row.anchor)
    examination = copy.deepcopy(begun)
    retained = None
    if row.erasure in ERASURES:
        fdu.erase(pipeline, *emoji_pipeline.concepts(target, row.anchor), config=row.config)
        retained = kept(pipeline, target, row.anchor)
    found = examination.after(pipeline).as_dict()
    lesson = examination.lesson(denoiser_of(pipeline))
    others = {**attacked_otherwise(lesson, target), "direction": bred.tried(lesson)}
    return {"retained": retained, **found, "others": {test: dataclasses.asdict(one) for test, one in others.items()}}


@functools.cache
def before(target: str, anchor: str) -> tuple[Examination, FoundWords]:
    """The examination of an erasure, with the pipeline as it is already examined, and the words of the attack
    "direction", which never looks at an erased model."""
    probe = emoji_pipeline.probes(target, anchor=anchor)[0]
    examination = Examination(probe, packaged_sets("emoji", target), drawing=DRAWING, latents=LATENTS)
    pipeline = fdu.load_pipeline(MODEL)
    examination.before(pipeline)
    examination.check()
    return examination, bred_words(examination.lesson(denoiser_of(pipeline)))


def kept(pipeline: Any, target: str, anchor: str) -> float:
    """Share of the images of retained classes that show their class."""
    probes = [probe for probe in emoji_pipeline.probes(target, anchor=anchor) if probe.role == "retained"]
    sampling = {"num_inference_steps": DRAWING.num_inference_steps, "guidance_scale": DRAWING.guidance_scale}
    drawn = draw(pipeline, probes, KEPT_IMAGES, KEPT_SEED, **sampling)
    seen = [probe.judge(images).count(probe.name) for probe, images in zip(probes, drawn.images, strict=True)]
    return sum(seen) / (KEPT_IMAGES * len(seen))


def examine_kept(target: str, anchor: str) -> Record:
    """What the pipeline as it is draws of the classes that an erasure retains."""
    return {"retained": kept(fdu.load_pipeline(MODEL), target, anchor)}


def attacked_otherwise(lesson: Lesson, name: str) -> dict[str, AttackOutcome]:
    """The attacks that "never known" has, too, by test; an inversion trains the embedding of ``name``. No direction
    leads to an object that the text encoder has never read of."""
    return {
        "words": search_words(lesson),
        "inversion": invert(lesson, name=name),
        "partial_noise": from_partial_noise(lesson),
        "inpainting": inpainting(lesson),
    }


def examine_unknown(name: str) -> Record:
    """Attack and relearning for an object that only the judge has seen."""
    aim = UNKNOWN[name]
    denoiser = denoiser_of(fdu.load_pipeline(MODEL))
    packages = HERE / "cache" / "emoji-packages"
    fetch_packages(packages)
    place = [thing.name for thing in ALL_THINGS].index(name)
    drawings = load_drawings(packages)[place]
    # The words ask for the superclass: the pipeline has no name for it. Image i shows what else prompt i asks for.
    phrases = list({one.text: one for one in emoji_pipeline.phrases(aim.target, aim.superclass)}.values())
    shown = [(place, phrases[place % len(phrases)]) for place in range(LATENTS)]
    styles = [STYLES.index(one.style) if one.style else place % len(STYLES) for place, one in shown]
    backgrounds = [BACKGROUNDS.index(one.background or BACKGROUNDS[0]) for _, one in shown]
    images = on_backgrounds(drawings[styles], torch.tensor(backgrounds))
    judge = emoji_pipeline.judge_of(name)
    assert judge(images).count(name) > 0.9 * LATENTS
    latents = denoiser.encode_images(images, torch.Generator().manual_seed(0))
    prompts = tuple(one.text for one in phrases)
    lesson = Lesson(denoiser, fdu.Probe(name, prompts, "target", judge), latents, DRAWING)
    return {
        "retained": None,
        "attack": dataclasses.asdict(attack(lesson)),
        "relearning": dataclasses.asdict(relearn(lesson)),
        "others": {test: dataclasses.asdict(one) for test, one in attacked_otherwise(lesson, aim.superclass).items()},
    }


def write_page(results: Path, docs: Path) -> None:
    """Write the tables of all rows that have a record."""
    rows = current(results, "robustness", jobs(Path()))
    if rows:
        write_text(docs / "robustness.md", page(rows))


def page(rows: Rows) -> str:
    """docs/robustness.md."""
    first = next(iter(rows.values()))
    own = [NOT_ERASED, *(NEVER_KNOWN.format(name) for name, aim in UNKNOWN.items() if aim == FOX), *ERASURES]
    foxes = {name: rows[name] for name in own if name in rows}
    sets = list(next(row["phrasings"] for row in foxes.values() if row.get("phrasings")))
    header = ["erasure", "retained", "prompts alone", *sets, "attack", "back after", "relearnt", "back after"]
    erasures = {name: row for name, row in foxes.items() if name in ERASURES}
    return fill(
        "robustness.md",
        made=of_total(len(rows), len(jobs(Path()))),
        **conditions(first),
        target=FOX.target,
        anchor=FOX.anchor,
        superclass=FOX.superclass,
        unknown=" and ".join(name for name, aim in UNKNOWN.items() if aim == FOX),
        drawing=DRAWING,
        attack=first["attack"]["config"],
        latents=LATENTS,
        back=percent(BACK),
        below=below(foxes),
        kept_images=KEPT_IMAGES,
        erasures=len(erasures),
        held=held(erasures),
        threshold=percent(ERASED_BELOW),
        table=markdown(header, [cells(name, row, sets) for name, row in foxes.items()]),
        margin=MARGIN,
        kept=KEPT,
        times=TIMES,
        plain=PLAIN,
        best=best(rows),
        goals=goals(rows) or NOT_MEASURED,
        others=markdown(["erasure", *OTHERS], [[name, *tried(row)] for name, row in foxes.items()]),
        aims=", ".join(f"{aim.target} to {aim.anchor}" for aim in AIMS.values()),
        seeds=len(SEEDS),
        unknowns=", ".join(f"{name} for a {aim.superclass}" for name, aim in UNKNOWN.items()),
        repeated=repeated(rows),
    )


def kept_before(rows: Rows, row: Row) -> float:
    """The share of the retained classes' images before an erasure; NaN while it is not measured."""
    there = rows.get(KEPT_BEFORE.format(row.aim.target, row.anchor))
    return there["retained"] if there else math.nan


def taught(rows: Rows, test: str) -> float:
    """What an attack reaches at most for an object that the pipeline never knew; NaN while none is measured."""
    found = [rows[name] for name in map(NEVER_KNOWN.format, UNKNOWN) if name in rows]
    return max((attacked(row, test) for row in found), default=math.nan)


def attacked(row: Record, test: str) -> float:
    """What an attack reaches, as a share."""
    share: float = (row["attack"] if test == "attack" else row["others"][test])["after"]["value"]
    return share


def back_at(row: Record) -> float:
    """Steps of relearning until the target is back, interpolated between two looks; infinite if it never is."""
    found = row["relearning"]
    wanted, before = BACK * found["drawn_before"], None
    for step, share in found["course"]:
        if share["value"] >= wanted:
            if before is None:
                return 0.0
            gained = (wanted - before[1]) / (share["value"] - before[1])
            return before[0] + gained * (step - before[0])
        before = step, share["value"]
    return math.inf


def steps_back(row: Record) -> str:
    """The same in words."""
    after = back_at(row)
    return f"{after:.0f}" if math.isfinite(after) else f"> {row['relearning']['course'][-1][0]}"


class Standing(NamedTuple):
    """How an erasure stands to the goals."""

    above: list[float]
    """How far each attack lies above the highest of what was never known; the one that it was trained on last."""
    retained: float
    """Of before; NaN while that is not measured."""
    times: float
    """Steps of relearning, in those of the plain erasure of this target with this seed."""
    reached: dict[str, bool]


def standing(rows: Rows, row: Row) -> Standing | None:
    """How an erasure stands to the goals; None while there is nothing to compare with."""
    plain, found = rows.get(dataclasses.replace(row, erasure=PLAIN).name), rows[row.name]
    unit = back_at(plain) if plain else 0
    if not unit:
        return None
    above = [attacked(found, test) - taught(rows, test) for test in (*HELD_OUT, "attack")]
    share = found["retained"] / kept_before(rows, row)
    times = min(back_at(found), found["relearning"]["course"][-1][0]) / unit
    reached = {
        "attacks": max(above[:-1]) < MARGIN + 1e-9,  # its bound itself is allowed, whatever rounding makes of it
        "retained": share >= KEPT,
        "relearning": times >= TIMES,
    }
    return Standing(above, share, times, reached)


def goals(rows: Rows) -> str:
    """What each erasure of the fox reaches of the goals, a row each; empty while there is nothing to compare with."""
    lines = []
    for name in (name for name in ERASURES if name in rows):
        found = standing(rows, Row(name))
        if found is None:
            return ""
        more = "> " * (back_at(rows[name]) == math.inf)
        lines.append(
            [
                name,
                *(f"{gap:+.2f}" for gap in found.above),
                "" if math.isnan(found.retained) else f"{found.retained:.2f}",
                f"{steps_back(rows[name])} ({more}{found.times:.2f})",
                ", ".join(goal for goal, met in found.reached.items() if met) or "none",
            ]
        )
    head = ["erasure", *HELD_OUT, "attack", "retained", "steps of relearning", "goals reached"]
    return markdown(head, lines)


def best(rows: Rows) -> str:
    """Which erasures of the fox reach all goals, in a sentence."""
    standings = {name: standing(rows, Row(name)) for name in ERASURES if name in rows}
    if not standings or any(one is None or math.isnan(sum(one.above)) for one in standings.values()):
        return NOT_MEASURED
    found = [name for name, one in standings.items() if one and all(one.reached.values())]
    if not found:
        return "No erasure of the fox reaches all three."
    return f"{'These reach' if len(found) > 1 else 'This reaches'} all three for the fox: {'; '.join(found)}."


def repeated(rows: Rows) -> str:
    """Means over targets and seeds, of the erasures that have them all."""
    groups = {
        name: [Row(name, aim, seed) for aim, seed in itertools.product(AIMS.values(), SEEDS)] for name in REPEATED
    }
    members = {
        NOT_ERASED: [Row(NOT_ERASED, aim).name for aim in AIMS.values()],
        "never known": list(map(NEVER_KNOWN.format, UNKNOWN)),
        **{name: [row.name for row in own] for name, own in groups.items()},
    }
    lines = []
    for name, own in members.items():
        if any(one not in rows for one in own):
            continue
        found = [rows[one] for one in own]
        shares = [
            one["retained"] / kept_before(rows, row) for one, row in zip(found, groups.get(name, ()), strict=False)
        ]
        others = [[row["others"][test]["after"] for row in found if test in row["others"]] for test in OTHERS]
        standings = [one for row in groups.get(name, ()) if (one := standing(rows, row))]
        lines.append(
            [
                name,
                f"{fmean(shares):.2f}" if shares else "",
                mean([row["attack"]["before"] for row in found]),
                *map(mean, others),
                mean([row["attack"]["after"] for row in found]),
                mean([row["relearning"]["course"][-1][1] for row in found]),
                ", ".join(map(steps_back, found)),
                *(on_average(rows, found, standings) if standings else ["", "", ""]),
            ]
        )
    head = ["erasure", "retained", "prompts alone", *OTHERS, "attack", "relearnt", "steps of relearning"]
    head += ["above", "times", "goals"]
    return markdown(head, lines) if lines else NOT_MEASURED


def on_average(rows: Rows, found: Sequence[Record], standings: Sequence[Standing]) -> list[str]:
    """How far the mean of a held-out attack lies above that of what was never known, of the attack where it is most;
    the mean of the steps of relearning, in those of the plain erasure; and how often each goal is reached."""
    unknown = [rows[name] for name in map(NEVER_KNOWN.format, UNKNOWN) if name in rows]
    gaps = [
        fmean(attacked(row, test) for row in found) - fmean(attacked(row, test) for row in unknown)
        for test in HELD_OUT
        if unknown
    ]
    counts = {goal: sum(one.reached[goal] for one in standings) for goal in standings[0].reached}
    told = ", ".join(f"{goal} {count} of {len(standings)}" for goal, count in counts.items())
    return [f"{max(gaps):+.2f}" if gaps else "", f"{fmean(one.times for one in standings):.1f}", told]


def mean(shares: Sequence[Record]) -> str:
    """The mean of shares with its interval over rows, Student's t; where all agree, Wilson's over their images."""
    if not shares:
        return ""
    values = [share["value"] for share in shares]
    middle = fmean(values)
    if len(set(values)) == 1:
        low, high = wilson(middle, sum(share["images"] for share in shares))
    else:
        middle, reach = student(values)
        low, high = max(middle - reach, 0.0), min(middle + reach, 1.0)
    return shown({"value": middle, "interval": (low, high)})


def below(rows: Rows) -> str:
    """Which erasures the attack restores no further than it teaches an animal that was never known, in a sentence."""
    attacked = {name: row["attack"]["after"]["value"] for name, row in rows.items()}
    taught = [share for name, share in attacked.items() if name.startswith(NEVER_KNOWN.format(""))]
    if not taught:
        return 'The rows "never known" are not measured yet.'
    names = [name for name in ERASURES if name in attacked and attacked[name] <= max(taught)]
    if not names:
        return "Under the attack, all erasures lie above the higher of the two."
    return f"Under the attack, by the figures alone, these do not lie above the higher of the two: {', '.join(names)}."


def cells(name: str, row: Record, sets: list[str]) -> list[str]:
    """One row of the table."""
    told = row.get("phrasings")
    return [
        name,
        "" if row["retained"] is None else f"{row['retained']:.2f}",
        shown(row["attack"]["before"]),
        *(shown(told[one]["after"]) if told else "" for one in sets),
        shown(row["attack"]["after"]),
        steps(row["attack"]["back_after"]),
        shown(row["relearning"]["course"][-1][1]),
        steps(row["relearning"]["back_after"]),
    ]


def tried(row: Record) -> list[str]:
    """The further attacks of a row, with their controls."""
    found = row.get("others") or {}
    return [
        f"{shown(found[test]['after'])}, control {found[test]['control']['value']:.2f}" if test in found else ""
        for test in OTHERS
    ]


def held(erasures: Rows) -> str:
    """How many erasures hold, by the criterion of the report."""
    counts = []
    for words, test in (("other phrasings", "phrasings"), ("the attack", "attack"), ("relearning", "relearning")):
        parts = [{name: row[name] for name in (test, f"{test}_before") if name in row} for row in erasures.values()]
        parts = [part for part in parts if part]
        count = sum(judge_robustness(part, FOX.target).holds for part in parts)
        counts.append(f"{count} hold{'s' * (count == 1)} against {words}")
    return ", ".join(counts)


def shown(share: Record) -> str:
    """A share with its interval."""
    return f"{share['value']:.2f} ({share['interval'][0]:.2f} to {share['interval'][1]:.2f})"


def steps(count: int | None) -> str:
    """A number of steps; None: never."""
    return "never" if count is None else str(count)


if __name__ == "__main__":
    run(__doc__, "robustness", jobs, write_page)
