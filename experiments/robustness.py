"""Which erasures hold? Erase "three" in several ways, examine each result, and write docs/robustness.md.

    python experiments/robustness.py        # resumes where it was stopped

Two rows are no erasures. "not erased" shows what the tests find where nothing was erased. "never known" lets the attack
and relearning ask the untouched pipeline for a shape that it has never seen, threes as in a mirror: that much comes not
from what an erasure left behind, but from how much a perturbation or fine-tuning can teach.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from experiment import conditions, fill, of_total, run
from torch import Tensor

import fdu
from fdu.comparison.page import markdown
from fdu.comparison.runs import weights
from fdu.comparison.sweep import Job, Record, Records, settings_identity
from fdu.config import PLACES
from fdu.evaluation import draw
from fdu.evaluation.robustness import Examination, JudgedSampling
from fdu.evaluation.robustness.attack import AttackConfig, attack
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.robustness.phrasings import packaged_sets
from fdu.evaluation.robustness.relearning import BACK, LEARNT_SEED, Lesson, RelearningConfig, relearn
from fdu.evaluation.verdict import ERASED_BELOW
from fdu.models.families import denoiser_of
from fdu.storage.output import write_text
from fdu.subjects.digits import pipeline as digits

TARGET, ANCHOR = "three", "eight"
DRAWING = JudgedSampling(images=32, num_inference_steps=12)
LATENTS = 32
KEPT_IMAGES, KEPT_SEED = 16, 1000
"""Images of each retained class, and the seed of the first."""
ERASURES: dict[str, dict[str, Any]] = {
    "token": {"train_method": "token", "learning_rate": 0.2},
    "text_encoder": {"train_method": "text_encoder", "learning_rate": 1e-3},
    "lora": {},
    "cross_attention": {"train_method": "cross_attention", "learning_rate": 1e-3},
    "full": {"train_method": "full", "learning_rate": 2e-4},
    "full, 480 steps": {"train_method": "full", "learning_rate": 2e-4, "max_train_steps": 480},
    "lora towards the superclass": {},
}
"""Name of each row -> settings of the erasure that differ from the defaults."""
ANCHORS = {"lora towards the superclass": digits.SUPERCLASS}
NOT_ERASED, NEVER_KNOWN = "not erased", "never known"
Rows = dict[str, Record]


def jobs(cache: Path) -> list[Job]:
    """One job per row, in the order of the table."""
    shared = {
        "weights": weights("embedded"),
        "target": TARGET,
        "drawing": dataclasses.asdict(DRAWING),
        "latents": LATENTS,
        "attack": dataclasses.asdict(AttackConfig()),
        "relearning": dataclasses.asdict(RelearningConfig()),
    }
    erasures = [
        Job(
            name,
            {**shared, "anchor": anchor_of(name), "settings": settings_identity(config_of(name), without=PLACES)},
            functools.partial(examine, name),
        )
        for name in ERASURES
    ]
    first = Job(NOT_ERASED, {**shared, "settings": {}}, functools.partial(examine, NOT_ERASED))
    last = Job(NEVER_KNOWN, {**shared, "settings": {}, "mirrored": True}, examine_unknown)
    return [first, *erasures, last]


def anchor_of(name: str) -> str:
    """The anchor of a row's erasure."""
    return ANCHORS.get(name, ANCHOR)


def config_of(name: str) -> fdu.EraseConfig:
    """All settings of a row's erasure."""
    return fdu.EraseConfig(preservation_prompts=digits.preserved(TARGET), **ERASURES[name])


def quiet_pipeline() -> Any:
    """The embedded pipeline without progress bars."""
    pipeline = digits.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def examine(name: str) -> Record:
    """Erase, and examine the result."""
    pipeline = quiet_pipeline()
    probes = digits.probes(TARGET)
    examination = Examination(probes[0], packaged_sets("digit", TARGET), drawing=DRAWING, latents=LATENTS)
    examination.before(pipeline)
    retained = None
    if name in ERASURES:
        fdu.erase(pipeline, *digits.concepts(TARGET, anchor_of(name)), config=config_of(name))
        kept = [probe for probe in probes if probe.role == "retained"]
        drawn = draw(pipeline, kept, KEPT_IMAGES, KEPT_SEED, DRAWING.num_inference_steps)
        seen = [probe.judge(images).count(probe.name) for probe, images in zip(kept, drawn.images, strict=True)]
        retained = sum(seen) / (KEPT_IMAGES * len(seen))
    return {"retained": retained, **examination.after(pipeline).as_dict()}


def examine_unknown() -> Record:
    """Attack and relearning for threes as in a mirror."""
    pipeline = quiet_pipeline()
    denoiser = denoiser_of(pipeline)
    known = digits.probes(TARGET)[0]
    threes = draw(pipeline, [known], LATENTS, LEARNT_SEED, DRAWING.num_inference_steps).images[0]

    def judge(images: Tensor) -> list[str]:
        return known.judge(images.flip(-1))

    assert judge(threes.flip(-1)).count(TARGET) > 0.9 * LATENTS
    latents = denoiser.encode_images(threes.flip(-1), torch.Generator().manual_seed(0))
    # The words ask for any digit: a digit's own name already has an image.
    prompts = tuple(dict.fromkeys(prompt.replace(TARGET, "digit") for prompt in known.prompts))
    probe = fdu.Probe(TARGET, prompts, "target", judge)
    lesson = Lesson(denoiser, probe, latents, DRAWING)
    attacked, relearnt = dataclasses.asdict(attack(lesson)), dataclasses.asdict(relearn(lesson))
    return {"retained": None, "attack": attacked, "relearning": relearnt}


def write_page(results: Path, docs: Path) -> None:
    """Write the table of all rows that have a record."""
    records = Records(results / "robustness.jsonl")
    found = {job.name: records.of(job.name, job.identity) for job in jobs(Path())}
    rows = {name: row for name, row in found.items() if row is not None and "failed" not in row}
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
        made=of_total(len(rows), len(ERASURES) + 2),
        **conditions(first),
        target=TARGET,
        anchor=ANCHOR,
        drawing=DRAWING,
        attack=first["attack"]["config"],
        latents=LATENTS,
        back=BACK,
        reading=reading(rows),
        erasures=len(erasures),
        held=held(erasures),
        threshold=ERASED_BELOW,
        table=markdown(header, [cells(name, row, sets) for name, row in rows.items()]),
    )


def cells(name: str, row: Record, sets: list[str]) -> list[str]:
    """One row of the table."""
    phrasings = row.get("phrasings")
    return [
        name,
        "" if row["retained"] is None else f"{row['retained']:.2f}",
        shown(row["attack"]["before"]),
        *(shown(phrasings[one]["after"]) if phrasings else "" for one in sets),
        shown(row["attack"]["after"]),
        steps(row["attack"]["back_after"]),
        shown(row["relearning"]["course"][-1][1]),
        steps(row["relearning"]["back_after"]),
    ]


def reading(rows: Rows) -> str:
    """How to read the other rows against "never known"."""
    unknown = rows.get(NEVER_KNOWN)
    if unknown is None:
        return ""
    attacked, relearnt = unknown["attack"]["after"]["value"], unknown["relearning"]["course"][-1][1]["value"]
    below = [name for name, row in rows.items() if row is not unknown and row["attack"]["after"]["value"] <= attacked]
    return (
        f"The attack draws it in {100 * attacked:.0f} % of the images, and relearning, after all its steps, in "
        f"{100 * relearnt:.0f} %.\nHow far a row lies above these two shares shows what the erasure left behind."
        + (f" Rows that do not exceed this under the attack: {', '.join(below)}." if below else "")
    )


def held(erasures: Rows) -> str:
    """How many erasures hold, by the criterion of the report."""
    tests = {"other words": "phrasings", "the attack": "attack", "relearning": "relearning"}
    counts = {
        words: sum(
            judge_robustness({name: row[name] for name in {test, f"{test}_before"} & row.keys()}, TARGET).holds
            for row in erasures.values()
        )
        for words, test in tests.items()
    }
    return ", ".join(f"{count} hold against {words}" for words, count in counts.items())


def shown(share: Record) -> str:
    """A share with its interval."""
    return f"{share['value']:.2f} ({share['interval'][0]:.2f} to {share['interval'][1]:.2f})"


def steps(count: int | None) -> str:
    """A number of steps; None: never."""
    return "never" if count is None else str(count)


if __name__ == "__main__":
    run(__doc__, lambda cache: {"robustness": jobs(cache)}, write_page)
