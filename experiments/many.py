"""Erase fifty objects, at once and one after another, judge all of them, and write docs/many.md.

    python experiments/many.py                  # resumes where it was stopped
    python experiments/many.py --only once/     # those erased at once

Takes about an hour and a half of two cores, shared by ``--workers`` processes.

Fifty of the 195 objects, evenly spread over their list, are targets. The anchor of each is its closest neighbour that
is not a target. Each row is judged on the same images: those of the targets in seen and unseen phrasings, and those of
neighbours, superclasses, unrelated objects and styles.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from experiment import NOT_MEASURED, conditions, current, dated, fill, of_total, run, student
from safetensors.torch import load_file, save_file

import fdu
from fdu.comparison.page import markdown
from fdu.comparison.runs import weights
from fdu.comparison.sweep import Job, Record, digest, settings_identity
from fdu.evaluation import Draws, Sampling
from fdu.evaluation.drawing import JUDGED_SEED, joint_probes
from fdu.report.charts import became_chart
from fdu.storage.output import whole_file, write_text
from fdu.subjects.embedded import Emoji
from fdu.subjects.emoji import emoji_pipeline
from fdu.subjects.emoji.objects import THINGS

MODEL, SEEDS = "emoji", (0, 1)
TARGETS = tuple(THINGS[place * len(THINGS) // 50].name for place in range(50))
ANCHORS = tuple(next(one.name for one in emoji_pipeline.relatives(name) if one.name not in TARGETS) for name in TARGETS)
PAIRS = tuple(zip(TARGETS, ANCHORS, strict=True))
DRAWING = Sampling(num_inference_steps=12, guidance_scale=2.0)
IMAGES = 8
"""Images of each class, and of each target in unseen phrasings."""
ONCE: dict[str, dict[str, Any]] = {
    "closed_form": {"train_method": "closed_form"},
    "closed_form, preserving less": {"train_method": "closed_form", "preservation_weight": 0.5},
    "lora": {},
    "lora, 480 steps": {"max_train_steps": 480},
    "full, 480 steps": {"train_method": "full", "max_train_steps": 480},
    "text_encoder": {"train_method": "text_encoder"},
    "text_encoder, 480 steps": {"train_method": "text_encoder", "max_train_steps": 480},
    "text_encoder, 960 steps": {"train_method": "text_encoder", "max_train_steps": 960},
    "text_encoder, 480 steps, mse": {"train_method": "text_encoder", "max_train_steps": 480, "divergence": "mse"},
    "text_encoder, 480 steps, pearson_chi2": {
        "train_method": "text_encoder",
        "max_train_steps": 480,
        "divergence": "pearson_chi2",
    },
}
"""Name of each row of fifty at once -> settings that differ from the defaults."""
IN_TURN: dict[str, dict[str, Any]] = {
    "closed_form": {"train_method": "closed_form"},
    "lora, 40 steps each": {"max_train_steps": 40},
    "text_encoder, 40 steps each": {"train_method": "text_encoder", "max_train_steps": 40},
}
"""The same for fifty one after another."""
WAYS = {"once": ONCE, "in turn": IN_TURN}
BY_DIVERGENCE = {
    "squared_hellinger": "text_encoder, 480 steps",
    "mse": "text_encoder, 480 steps, mse",
    "pearson_chi2": "text_encoder, 480 steps, pearson_chi2",
}
"""Rows that differ in the divergence alone."""
LEFT, KEPT = 0.05, 0.95
"""The goals: the mean share of the targets' images that show their target, at most; the share of the other classes'
images that show their class, of before, at least."""
REBOUND = 0.1
"""A concept rebounds if more than this share of its images shows it again after the later erasures."""
SHOWN = "once/text_encoder, 480 steps seed 0"
"""The row of the heat map."""
Rows = dict[str, Record]


def jobs(cache: Path) -> list[Job]:
    """One job per row and seed, in the order of the tables."""
    shared = {"weights": weights(MODEL), "pairs": PAIRS, "drawing": dataclasses.asdict(DRAWING), "images": IMAGES}
    found = [Job("before", shared, functools.partial(judge_before, cache), first=True)]
    for way, rows in WAYS.items():
        for name in rows:
            for seed in SEEDS:
                settings = settings_identity(config_of(way, name, seed, PAIRS))
                make = functools.partial(examine, cache, way, name, seed)
                found.append(Job(row_name(way, name, seed), {**shared, "settings": settings}, make))
    return [dated(job, *PAIRS, model=MODEL) for job in found]


def row_name(way: str, name: str, seed: int) -> str:
    """The name of a record."""
    return f"{way}/{name} seed {seed}"


def config_of(way: str, name: str, seed: int, pairs: Sequence[tuple[str, str]]) -> fdu.EraseConfig:
    """All settings of an erasure of these pairs."""
    preserved = emoji_pipeline.preserved(*(pair[0] for pair in pairs), anchors=[pair[1] for pair in pairs])
    return fdu.EraseConfig(preservation_prompts=preserved, seed=seed, **WAYS[way][name])


def probes() -> list[fdu.Probe]:
    """The images to draw, and who judges them."""
    lists = []
    for target, anchor in PAIRS:
        others = [name for name in TARGETS if name != target]
        lists.append(emoji_pipeline.probes(target, *others, anchor=anchor))
    return joint_probes(lists)


def drawn(pipeline: Any, asked: Sequence[fdu.Probe]) -> Draws:
    """The images of all probes."""
    return fdu.draw(pipeline, asked, IMAGES, JUDGED_SEED, **DRAWING.settings())


def images_before(cache: Path) -> Draws:
    """The images before any erasure, drawn once per machine."""
    asked = probes()
    drawing = [dataclasses.asdict(DRAWING), IMAGES, JUDGED_SEED, [one.prompts for one in asked]]
    file = cache / f"before-many-{digest([weights(MODEL), drawing])}.safetensors"
    if not file.is_file():
        images = torch.stack(drawn(fdu.load_pipeline(MODEL), asked).images)
        with whole_file(file) as fresh:
            save_file({"images": images.half()}, str(fresh))
    return Draws([one.float() for one in load_file(file)["images"]])


def judge_before(cache: Path) -> Record:
    """The figures before any erasure."""
    images, asked = images_before(cache), probes()
    return figures(fdu.evaluate(images, images, asked, emoji_pipeline.features()), asked)


def examine(cache: Path, way: str, name: str, seed: int) -> Record:
    """Erase, and judge the result."""
    pipeline = fdu.load_pipeline(MODEL)
    if way == "once":
        targets, anchors = zip(*(emoji_pipeline.concepts(*pair) for pair in PAIRS), strict=True)
        result = fdu.erase(pipeline, targets, anchors, config=config_of(way, name, seed, PAIRS))
        told = {"seconds": round(result.seconds, 1)}
    else:
        told = erased_in_turn(pipeline, name, seed, PAIRS)
    asked = probes()
    evaluation = fdu.evaluate(images_before(cache), drawn(pipeline, asked), asked, emoji_pipeline.features())
    return {**figures(evaluation, asked), **told}


def erased_in_turn(pipeline: Any, name: str, seed: int, pairs: Sequence[tuple[str, str]]) -> Record:
    """Erase targets one after another: of each the share of its images that show it right after its erasure, and the
    seconds of all erasures."""
    at_once, seconds = {}, 0.0
    for pair in pairs:
        result = fdu.erase(pipeline, *emoji_pipeline.concepts(*pair), config=config_of("in turn", name, seed, [pair]))
        seconds += result.seconds
        if result.trainable.lora_layers():
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        probe = emoji_pipeline.probes(pair[0], anchor=pair[1])[0]
        (images,) = drawn(pipeline, [probe]).images
        at_once[pair[0]] = probe.judge(images).count(pair[0]) / IMAGES
    return {"at_once": at_once, "seconds": round(seconds, 1)}


def figures(evaluation: fdu.Evaluation, asked: Sequence[fdu.Probe]) -> Record:
    """The figures after an erasure that the page uses."""
    after = evaluation.after
    names = ["target_accuracy", "unseen_accuracy", "retained_accuracy", "attribute_accuracy"]
    names += [f"retained_by_group.{name}" for name in after.retained_by_group]
    return {
        "shares": {name: [after.value(name), *after.intervals[name]] for name in names},
        "per_class": {one.name: after.per_class[one.name] for one in asked if one.role != "unseen"},
        "became": after.became,
        "change": evaluation.change["retained"],
    }


def write_page(results: Path, docs: Path) -> None:
    """Write page and heat map from the records that are up to date."""
    rows = current(results, "many", jobs(Path()))
    if "before" not in rows:
        return
    shown = rows.get(SHOWN)
    if shown:
        write_text(docs / "many" / "became.svg", became_chart(shown["became"]).chart.svg(whole=True))
    page = fill(
        "many.md",
        made=of_total(len(rows), len(jobs(Path()))),
        **conditions(rows["before"]),
        count=len(TARGETS),
        width=json.loads((Emoji.data / "text_encoder" / "config.json").read_text())["hidden_size"],
        images=IMAGES,
        others=len(rows["before"]["per_class"]) - len(TARGETS),
        drawing=DRAWING,
        rebound=f"{100 * REBOUND:.0f}",
        left=f"{100 * LEFT:.0f}",
        kept=f"{100 * KEPT:.0f}",
        one_image=f"{100 / IMAGES:.1f}",
        goals=goals(rows),
        divergences=by_divergence(rows),
        once=table(rows, "once"),
        in_turn=table(rows, "in turn"),
        map="![What each of the fifty became](many/became.svg)" if shown else NOT_MEASURED,
        pairs=", ".join(f"{target} to {anchor}" for target, anchor in PAIRS),
    )
    write_text(docs / "many.md", page)


def table(rows: Rows, way: str) -> str:
    """One line per row and seed."""
    head = ["erasure", "seed", "left, seen", "left, unseen", "retained", "near", "attributes", "change", "not erased"]
    head += ["seconds", *(["rebounds"] if way == "in turn" else [])]
    lines = [["none", "", *shares(rows["before"]), *[""] * (len(head) - 7)]]
    for name in WAYS[way]:
        for seed in SEEDS:
            row = rows.get(row_name(way, name, seed))
            if row:
                last = [f"{row['seconds']:.1f}", *([rebounds(row)] if way == "in turn" else [])]
                lines.append([name, str(seed), *shares(row), f"{100 * row['change']:.2f}", not_erased(row), *last])
    return markdown(head, lines) if len(lines) > 1 else NOT_MEASURED


def goals(rows: Rows) -> str:
    """What is left and retained by each erasure, as means over the seeds, and whether it reaches the goals."""
    before, lines = rows["before"]["shares"]["retained_accuracy"][0], []
    for way, named in WAYS.items():
        for name in named:
            found = [rows[one] for seed in SEEDS if (one := row_name(way, name, seed)) in rows]
            if not found:
                continue
            left = fmean(fmean(row["per_class"][target] for target in TARGETS) for row in found)
            unseen = fmean(row["shares"]["unseen_accuracy"][0] for row in found)
            retained = fmean(row["shares"]["retained_accuracy"][0] for row in found) / before
            reached = (max(left, unseen) <= LEFT, retained >= KEPT)
            if way == "in turn":
                reached += (not any(came_back(row) for row in found),)
            cells = [f"{100 * share:.1f}" for share in (left, unseen, retained)]
            lines.append([name, way, *cells, "yes" if all(reached) else "no"])
    head = ["erasure", "", "left, seen", "left, unseen", "retained, of before", "reaches the goals"]
    return markdown(head, lines) if lines else NOT_MEASURED


def told(results: Path) -> str:
    """What results.md says of the records in a folder: the divergences at fifty concepts."""
    rows = current(results, "many", jobs(Path()))
    if "before" not in rows:
        return "Fifty concepts at once are not measured yet."
    return f"At fifty concepts at once ([many.md](many.md)), by training the text encoder:\n\n{by_divergence(rows)}"


def by_divergence(rows: Rows) -> str:
    """The first divergence minus each other one at fifty concepts at once, paired by class and averaged over seeds."""
    first, *others = BY_DIVERGENCE
    kept = [name for name in rows["before"]["per_class"] if name not in TARGETS]
    lines = []
    for other in others:
        pairs = [[rows.get(row_name("once", BY_DIVERGENCE[one], seed)) for one in (first, other)] for seed in SEEDS]
        found = [(one, two) for one, two in pairs if one and two]
        if found:
            cells = []
            for names in (TARGETS, kept):
                gaps = [fmean(one["per_class"][name] - two["per_class"][name] for one, two in found) for name in names]
                middle, reach = student(gaps)
                cells.append(f"{100 * middle:.1f} ({100 * (middle - reach):.1f} to {100 * (middle + reach):.1f})")
            lines.append([f"{first} minus {other}", *cells])
    return markdown(["", "left, seen", "retained"], lines) if lines else NOT_MEASURED


def shares(row: Record) -> list[str]:
    """Shares with their intervals, in percent."""
    names = ("target_accuracy", "unseen_accuracy", "retained_accuracy", "retained_by_group.near", "attribute_accuracy")
    return ["{:.1f} ({:.1f} to {:.1f})".format(*(100 * one for one in row["shares"][name])) for name in names]


def not_erased(row: Record) -> str:
    """The targets of which more than the bound is left, with their shares."""
    left = {name: row["per_class"][name] for name in TARGETS if row["per_class"][name] > REBOUND}
    return listed(left) or "none"


def rebounds(row: Record) -> str:
    """The same in words."""
    return listed(came_back(row)) or "none"


def came_back(row: Record) -> dict[str, float]:
    """The targets that were gone right after their own erasure, and are drawn again at the end, with their shares."""
    shares = {name: row["per_class"][name] for name in TARGETS}
    return {name: share for name, share in shares.items() if row["at_once"][name] <= REBOUND < share}


def listed(shares: dict[str, float]) -> str:
    """Names with shares in percent, and how many, largest share first."""
    ordered = sorted(shares.items(), key=lambda one: -one[1])
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(f"{name} {100 * share:.0f}" for name, share in ordered[:4]) + more


if __name__ == "__main__":
    run(__doc__, "many", jobs, write_page)
