"""Which erasures hold? Erase "fox" in several ways, examine each result, and write docs/robustness.md.

    python experiments/robustness.py        # resumes where it was stopped

Takes about half an hour of two cores, shared by ``--workers`` processes. The rows "never known" need the network, for
real emoji, and resvg-py.

Three rows are not erasures. "not erased" shows the figures of the pipeline as it is. For "never known", the attack and
relearning ask that pipeline for an animal that it has never seen, with real emoji of it. These rows show how much a
perturbation or fine-tuning can teach where an erasure left nothing behind.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from experiment import HERE, conditions, current, dated, fill, of_total, run

import fdu
from fdu.comparison.page import markdown
from fdu.comparison.runs import weights
from fdu.comparison.sweep import Job, Record, settings_identity
from fdu.evaluation import draw
from fdu.evaluation.robustness import AttackConfig, Examination, JudgedSampling, attack
from fdu.evaluation.robustness.holding import OTHERS, judge_robustness
from fdu.evaluation.robustness.image_attacks import ImageAttackConfig, from_partial_noise, inpainting
from fdu.evaluation.robustness.phrasings import packaged_sets
from fdu.evaluation.robustness.relearning import (
    BACK,
    InversionConfig,
    Lesson,
    RelearningConfig,
    invert,
    relearn,
)
from fdu.evaluation.robustness.word_attacks import DirectionConfig, WordSearchConfig, breed_words, search_words
from fdu.evaluation.verdict import ERASED_BELOW, percent
from fdu.models.families import denoiser_of
from fdu.storage.output import write_text
from fdu.subjects.emoji import emoji_pipeline
from fdu.subjects.emoji.drawings import PACKAGES, fetch_packages, load_drawings, on_backgrounds
from fdu.subjects.emoji.objects import ALL_THINGS, BACKGROUNDS, STYLES

MODEL, TARGET, ANCHOR, SUPERCLASS = "emoji", "fox", "wolf", "mammal"
DRAWING = JudgedSampling(images=32, num_inference_steps=12, guidance_scale=2.0)
LATENTS = 32
KEPT_IMAGES, KEPT_SEED = 8, 1000
"""Images of each retained class, and the seed of the first."""
ERASURES: dict[str, tuple[str, dict[str, Any]]] = {
    "closed_form": (ANCHOR, {"train_method": "closed_form"}),
    "lora": (ANCHOR, {}),
    "lora, 4 rounds": (ANCHOR, {"adversarial_rounds": 4}),
    "closed_form, 4 rounds": (ANCHOR, {"train_method": "closed_form", "adversarial_rounds": 4}),
    "lora, 4 rounds, alternating": (ANCHOR, {"adversarial_rounds": 4, "adversarial_order": "alternate"}),
    "full": (ANCHOR, {"train_method": "full"}),
    "full, 4 rounds": (ANCHOR, {"train_method": "full", "adversarial_rounds": 4}),
    "token": (ANCHOR, {"train_method": "token"}),
    "text_encoder": (ANCHOR, {"train_method": "text_encoder"}),
    "cross_attention": (ANCHOR, {"train_method": "cross_attention"}),
    "lora from the closed form": (ANCHOR, {"init": "closed_form", "rank": 64}),
    "full, 480 steps": (ANCHOR, {"train_method": "full", "max_train_steps": 480}),
    "lora towards the superclass": (SUPERCLASS, {}),
    **{
        f"lora, {name}": (ANCHOR, {"divergence": name})
        for name in ("mse", "jensen_shannon", "le_cam", "alpha:1.5", "pearson_chi2")
    },
}
"""Name of each row -> anchor, and settings that differ from the defaults."""
OTHER_CONFIGS = (WordSearchConfig, DirectionConfig, InversionConfig, ImageAttackConfig)
NOT_ERASED, NEVER_KNOWN = "not erased", "never known: {}"
UNKNOWN = ("zebra", "koala")
"""Mammals that only the judge has seen."""
Rows = dict[str, Record]


def jobs(cache: Path) -> list[Job]:
    """One job per row, in the order of the table."""
    shared = {
        "weights": weights(MODEL),
        "target": TARGET,
        "drawing": dataclasses.asdict(DRAWING),
        "latents": LATENTS,
        "attack": dataclasses.asdict(AttackConfig()),
        "relearning": dataclasses.asdict(RelearningConfig()),
        "others": [dataclasses.asdict(one()) for one in OTHER_CONFIGS],
        "kept": [KEPT_IMAGES, KEPT_SEED],
    }
    rows = [Job(NOT_ERASED, {**shared, "settings": {}}, functools.partial(examine, NOT_ERASED))]
    for name in UNKNOWN:
        packages = [package.sha256 for package in PACKAGES.values()]
        identity = {**shared, "settings": {}, "unknown": name, "anchor": SUPERCLASS, "packages": packages}
        rows.append(Job(NEVER_KNOWN.format(name), identity, functools.partial(examine_unknown, name)))
    for name, (anchor, _) in ERASURES.items():
        identity = {**shared, "anchor": anchor, "settings": settings_identity(config_of(name))}
        rows.append(Job(name, identity, functools.partial(examine, name)))
    sets = packaged_sets("emoji", TARGET)
    return [dated(job, (TARGET, job.identity.get("anchor", ANCHOR)), model=MODEL, phrasings=sets) for job in rows]


def config_of(name: str) -> fdu.EraseConfig:
    """All settings of a row's erasure."""
    anchor, settings = ERASURES[name]
    preserved = emoji_pipeline.preserved(TARGET, anchors=[anchor])
    return fdu.EraseConfig(**{"preservation_prompts": preserved, **settings})


def examine(name: str) -> Record:
    """Erase, and examine the result."""
    pipeline = fdu.load_pipeline(MODEL)
    anchor = ERASURES[name][0] if name in ERASURES else ANCHOR
    probes = emoji_pipeline.probes(TARGET, anchor=anchor)
    sets = packaged_sets("emoji", TARGET)
    # The further attacks on the pipeline before the erasure are those of the row "not erased".
    examination = Examination(probes[0], sets, drawing=DRAWING, latents=LATENTS)
    examination.before(pipeline)
    retained = None
    if name in ERASURES:
        fdu.erase(pipeline, *emoji_pipeline.concepts(TARGET, anchor), config=config_of(name))
        kept = [probe for probe in probes if probe.role == "retained"]
        sampling = {"num_inference_steps": DRAWING.num_inference_steps, "guidance_scale": DRAWING.guidance_scale}
        drawn = draw(pipeline, kept, KEPT_IMAGES, KEPT_SEED, **sampling)
        seen = [probe.judge(images).count(probe.name) for probe, images in zip(kept, drawn.images, strict=True)]
        retained = sum(seen) / (KEPT_IMAGES * len(seen))
    found = examination.after(pipeline).as_dict()
    lesson = examination.lesson(denoiser_of(pipeline))
    return {"retained": retained, **found, "others": attacked_otherwise(lesson, TARGET)}


def attacked_otherwise(lesson: Lesson, name: str) -> dict[str, dict[str, Any]]:
    """The further attacks on a pipeline, by test; an inversion trains the embedding of ``name``."""
    found = {
        "words": search_words(lesson),
        "inversion": invert(lesson, name=name),
        "partial_noise": from_partial_noise(lesson),
        "inpainting": inpainting(lesson),
    }
    if name == lesson.probe.name:  # no direction leads to an animal that the text encoder has never read of
        found["direction"] = breed_words(lesson)
    return {test: dataclasses.asdict(one) for test, one in found.items()}


def examine_unknown(name: str) -> Record:
    """Attack and relearning for an animal that only the judge has seen."""
    denoiser = denoiser_of(fdu.load_pipeline(MODEL))
    packages = HERE / "cache" / "emoji-packages"
    fetch_packages(packages)
    place = [thing.name for thing in ALL_THINGS].index(name)
    drawings = load_drawings(packages)[place]
    # The words ask for any mammal: the pipeline has no word for this one. Image i shows what else prompt i asks for.
    phrases = list({one.text: one for one in emoji_pipeline.phrases(TARGET, SUPERCLASS)}.values())
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
        "others": attacked_otherwise(lesson, SUPERCLASS),
    }


def write_page(results: Path, docs: Path) -> None:
    """Write the table of all rows that have a record."""
    rows = current(results, "robustness", jobs(Path()))
    if rows:
        write_text(docs / "robustness.md", page(rows))


def page(rows: Rows) -> str:
    """docs/robustness.md."""
    first = next(iter(rows.values()))
    sets = list(next(row["phrasings"] for row in rows.values() if row.get("phrasings")))
    header = ["erasure", "retained", "prompts alone", *sets, "attack", "back after", "relearnt", "back after"]
    erasures = {name: row for name, row in rows.items() if name in ERASURES}
    return fill(
        "robustness.md",
        made=of_total(len(rows), len(ERASURES) + 1 + len(UNKNOWN)),
        **conditions(first),
        target=TARGET,
        anchor=ANCHOR,
        superclass=SUPERCLASS,
        unknown=" and ".join(UNKNOWN),
        drawing=DRAWING,
        attack=first["attack"]["config"],
        latents=LATENTS,
        back=percent(BACK),
        below=below(rows),
        kept_images=KEPT_IMAGES,
        erasures=len(erasures),
        held=held(erasures),
        threshold=percent(ERASED_BELOW),
        table=markdown(header, [cells(name, row, sets) for name, row in rows.items()]),
        others=markdown(["erasure", *OTHERS], [[name, *tried(row)] for name, row in rows.items()]),
    )


def below(rows: Rows) -> str:
    """Which erasures the attack restores no further than it teaches an animal that was never known, in a sentence."""
    attacked = {name: row["attack"]["after"]["value"] for name, row in rows.items()}
    taught = [attacked[name] for name in map(NEVER_KNOWN.format, UNKNOWN) if name in attacked]
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
        count = sum(judge_robustness(part, TARGET).holds for part in parts)
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
