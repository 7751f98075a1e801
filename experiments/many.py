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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from experiment import NOT_MEASURED, conditions, current, dated, fill, of_total, run
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
}
"""The same for fifty one after another."""
WAYS = {"once": ONCE, "in turn": IN_TURN}
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
        told = {"at_once": dict(erased_in_turn(pipeline, name, seed))}
    asked = probes()
    evaluation = fdu.evaluate(images_before(cache), drawn(pipeline, asked), asked, emoji_pipeline.features())
    return {**figures(evaluation, asked), **told}


def erased_in_turn(pipeline: Any, name: str, seed: int) -> Iterator[tuple[str, float]]:
    """Erase the targets one after another; of each, the share of its images that show it right after its erasure."""
    for pair in PAIRS:
        target, anchor = emoji_pipeline.concepts(*pair)
        fdu.erase(pipeline, target, anchor, config=config_of("in turn", name, seed, [pair]))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        probe = emoji_pipeline.probes(pair[0], anchor=pair[1])[0]
        (images,) = drawn(pipeline, [probe]).images
        yield pair[0], probe.judge(images).count(pair[0]) / IMAGES


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
        once=table(rows, "once"),
        in_turn=table(rows, "in turn"),
        map="![What each of the fifty became](many/became.svg)" if shown else NOT_MEASURED,
        pairs=", ".join(f"{target} to {anchor}" for target, anchor in PAIRS),
    )
    write_text(docs / "many.md", page)


def table(rows: Rows, way: str) -> str:
    """One line per row and seed."""
    head = ["erasure", "seed", "left, seen", "left, unseen", "retained", "near", "attributes", "change", "not erased"]
    head += ["rebounds"] if way == "in turn" else ["seconds"]
    lines = [["none", "", *shares(rows["before"]), "", "", ""]]
    for name in WAYS[way]:
        for seed in SEEDS:
            row = rows.get(row_name(way, name, seed))
            if row:
                last = rebounds(row) if way == "in turn" else f"{row['seconds']:.1f}"
                lines.append([name, str(seed), *shares(row), f"{100 * row['change']:.2f}", not_erased(row), last])
    return markdown(head, lines) if len(lines) > 1 else NOT_MEASURED


def shares(row: Record) -> list[str]:
    """Shares with their intervals, in percent."""
    names = ("target_accuracy", "unseen_accuracy", "retained_accuracy", "retained_by_group.near", "attribute_accuracy")
    return ["{:.1f} ({:.1f} to {:.1f})".format(*(100 * one for one in row["shares"][name])) for name in names]


def not_erased(row: Record) -> str:
    """The targets of which more than the bound is left, with their shares."""
    left = {name: row["per_class"][name] for name in TARGETS if row["per_class"][name] > REBOUND}
    return listed(left) or "none"


def rebounds(row: Record) -> str:
    """The targets that were gone right after their own erasure, and are drawn again at the end."""
    again = {
        name: row["per_class"][name] for name in TARGETS if row["at_once"][name] <= REBOUND < row["per_class"][name]
    }
    return listed(again) or "none"


def listed(shares: dict[str, float]) -> str:
    """Names with shares in percent, and how many, largest share first."""
    ordered = sorted(shares.items(), key=lambda one: -one[1])
    more = f" and {len(ordered) - 4} more" if len(ordered) > 4 else ""
    return ", ".join(f"{name} {100 * share:.0f}" for name, share in ordered[:4]) + more


if __name__ == "__main__":
    run(__doc__, "many", jobs, write_page)
