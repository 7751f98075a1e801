"""Which erasures hold? Erase "three" in several ways, examine each result, and write docs/robustness.md.

    python experiments/robustness.py        # resumes where it was stopped

Two rows are not erasures. "not erased" shows the figures of the pipeline as it is. For "never known", the attack and
relearning ask that pipeline for mirrored threes, which it has never seen. That row shows how much a perturbation or
fine-tuning can teach where an erasure left nothing behind.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from experiment import conditions, current, dated, fill, of_total, run
from torch import Tensor

import fdu
from fdu.comparison.page import markdown
from fdu.comparison.runs import weights
from fdu.comparison.sweep import Job, Record, settings_identity
from fdu.evaluation import draw
from fdu.evaluation.robustness import AttackConfig, Examination, JudgedSampling, attack
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.robustness.phrasings import packaged_sets
from fdu.evaluation.robustness.relearning import BACK, LEARNT_SEED, Lesson, RelearningConfig, relearn
from fdu.evaluation.verdict import ERASED_BELOW, percent
from fdu.models.families import denoiser_of
from fdu.storage.output import write_text
from fdu.subjects.digits import pipeline as digits

TARGET, ANCHOR = "three", "eight"
DRAWING = JudgedSampling(images=32, num_inference_steps=12)
LATENTS = 32
KEPT_IMAGES, KEPT_SEED = 16, 1000
"""Images of each retained class, and the seed of the first."""
FULL = {"train_method": "full", "learning_rate": 2e-4}
ERASURES: dict[str, tuple[str, dict[str, Any]]] = {
    "token": (ANCHOR, {"train_method": "token", "learning_rate": 0.2}),
    "text_encoder": (ANCHOR, {"train_method": "text_encoder", "learning_rate": 1e-3}),
    "lora": (ANCHOR, {}),
    "cross_attention": (ANCHOR, {"train_method": "cross_attention", "learning_rate": 1e-3}),
    "full": (ANCHOR, FULL),
    "full, 480 steps": (ANCHOR, {**FULL, "max_train_steps": 480}),
    "lora towards the superclass": (digits.SUPERCLASS, {}),
}
"""Name of each row -> anchor, and settings that differ from the defaults."""
NOT_ERASED, NEVER_KNOWN = "not erased", "never known"
Rows = dict[str, Record]


def jobs(cache: Path) -> list[Job]:
    """One job per row, in the order of the table."""
    shared = {
        "weights": weights("digits"),
        "target": TARGET,
        "drawing": dataclasses.asdict(DRAWING),
        "latents": LATENTS,
        "attack": dataclasses.asdict(AttackConfig()),
        "relearning": dataclasses.asdict(RelearningConfig()),
    }
    first = Job(NOT_ERASED, {**shared, "settings": {}}, functools.partial(examine, NOT_ERASED))
    last = Job(NEVER_KNOWN, {**shared, "settings": {}, "mirrored": True}, examine_unknown)
    erasures = [
        Job(
            name,
            {**shared, "anchor": anchor, "settings": settings_identity(config_of(name))},
            functools.partial(examine, name),
        )
        for name, (anchor, _) in ERASURES.items()
    ]
    return [
        dated(job, (TARGET, job.identity.get("anchor", ANCHOR)), phrasings=packaged_sets("digit", TARGET))
        for job in (first, *erasures, last)
    ]


def config_of(name: str) -> fdu.EraseConfig:
    """All settings of a row's erasure."""
    return fdu.EraseConfig(preservation_prompts=digits.preserved(TARGET), **ERASURES[name][1])


def examine(name: str) -> Record:
    """Erase, and examine the result."""
    pipeline = digits.load_pipeline()
    probes = digits.probes(TARGET)
    examination = Examination(probes[0], packaged_sets("digit", TARGET), drawing=DRAWING, latents=LATENTS)
    examination.before(pipeline)
    retained = None
    if name in ERASURES:
        fdu.erase(pipeline, *digits.concepts(TARGET, ERASURES[name][0]), config=config_of(name))
        kept = [probe for probe in probes if probe.role == "retained"]
        drawn = draw(pipeline, kept, KEPT_IMAGES, KEPT_SEED, DRAWING.num_inference_steps)
        seen = [probe.judge(images).count(probe.name) for probe, images in zip(kept, drawn.images, strict=True)]
        retained = sum(seen) / (KEPT_IMAGES * len(seen))
    return {"retained": retained, **examination.after(pipeline).as_dict()}


def examine_unknown() -> Record:
    """Attack and relearning for mirrored threes."""
    pipeline = digits.load_pipeline()
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
    rows = current(results, "robustness", jobs(Path()))
    if rows:
        write_text(docs / "robustness.md", page(rows))


def page(rows: Rows) -> str:
    """docs/robustness.md."""
    first = next(iter(rows.values()))
    sets = list(next(row["phrasings"] for row in rows.values() if row.get("phrasings")))
    header = ["erasure", "retained", "prompts alone", *sets, "attack", "back after", "relearnt", "back after"]
    erasures = {name: row for name, row in rows.items() if name in ERASURES}
    attacked = {name: row["attack"]["after"]["value"] for name, row in rows.items()}
    taught = attacked.get(NEVER_KNOWN, 0.0)
    below = [name for name, share in attacked.items() if share <= taught and name != NEVER_KNOWN]
    return fill(
        "robustness.md",
        made=of_total(len(rows), len(ERASURES) + 2),
        **conditions(first),
        target=TARGET,
        anchor=ANCHOR,
        drawing=DRAWING,
        attack=first["attack"]["config"],
        latents=LATENTS,
        back=percent(BACK),
        below=", ".join(below) or "none",
        erasures=len(erasures),
        held=held(erasures),
        threshold=percent(ERASED_BELOW),
        table=markdown(header, [cells(name, row, sets) for name, row in rows.items()]),
    )


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


def held(erasures: Rows) -> str:
    """How many erasures hold, by the criterion of the report."""
    counts = []
    for words, test in (("other phrasings", "phrasings"), ("the attack", "attack"), ("relearning", "relearning")):
        parts = [{name: row[name] for name in (test, f"{test}_before") if name in row} for row in erasures.values()]
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
