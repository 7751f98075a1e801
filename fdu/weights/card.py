"""The model card beside saved weights: what was erased, how to load it, what was measured, what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from jinja2 import Environment, PackageLoader, StrictUndefined

from fdu.evaluation import Evaluation, Probe
from fdu.loading import HUB_ID, is_embedded
from fdu.verdict import comparison, judge, percent, uncertainty
from fdu.weights.kohya import KOHYA_FILE
from fdu.weights.writers import Format

CARD_FILE = "README.md"
PLACES = ("cache_dir", "checkpoint_dir", "resume_from_checkpoint", "logging_dir", "report_to")
"""Settings that say where a run kept its files: nobody's business but its owner's."""
WHAT = {
    "lora": "A LoRA adapter",
    "kohya": "A LoRA adapter with kohya's names",
    "pipeline": "A diffusers pipeline",
    "delta": "The changed weights of a diffusers pipeline",
}


def write_card(
    folder: str | Path,
    format: Format,
    pipeline: DiffusionPipeline,
    record: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    probes: Sequence[Probe] = (),
) -> Path:
    """Write README.md, with the front matter that the Hugging Face hub reads. It names no place on this machine.

    Args:
        folder: where the weights are, of the format that :func:`fdu.weights.write` was given.
        format: that format.
        pipeline: the pipeline with the erasure.
        record: :meth:`fdu.ErasureResult.record`.
        evaluation: the figures, if there are any.
        probes: what was drawn for them.
    """
    embedded = is_embedded(str(pipeline.config.get("_name_or_path", "")))
    base = "the embedded pipeline of fdu" if embedded else _line(record["base"]) or "an unnamed model"
    environment = Environment(
        loader=PackageLoader("fdu"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, line=_line)
    figures: dict[str, Any] = {"rows": []}
    if evaluation is not None:
        figures = {
            "rows": comparison(evaluation, probes),
            "images": evaluation.images_per_class,
            "uncertainty": percent(uncertainty(evaluation.images_per_class)),
            "verdict": " ".join(judge(evaluation, probes).sentences),
        }
    settings = [
        (name, _line(json.dumps(value, ensure_ascii=False)))
        for name, value in record["config"].items()
        if name not in PLACES
    ]
    page = environment.get_template("card.md.j2").render(
        record=record,
        format=format,
        base=base,
        base_id=record["base"] if not embedded and HUB_ID.fullmatch(record["base"]) else None,
        pipeline_class=type(pipeline).__name__,
        target=_line(record["target"]["name"]),
        anchor=_line(record["anchor"]["name"]),
        article_what=WHAT[format],
        changes="answers prompts about"
        if format == "pipeline"
        else "make it answer prompts about"
        if format == "delta"
        else "makes it answer prompts about",
        code=_code(format, type(pipeline).__name__, record["base"], embedded),
        advice=_advice(format, record["config"]["train_method"]),
        settings=settings,
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        **figures,
    )
    path = Path(folder) / CARD_FILE
    path.write_text(page, encoding="utf-8")
    return path


def _code(format: Format, pipeline_class: str, base: str, embedded: bool) -> str:
    """The lines of Python that load the weights."""
    if format == "pipeline":
        return (
            "from diffusers import DiffusionPipeline\n\n"
            'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype="auto")'
        )
    place = base if HUB_ID.fullmatch(base) else "path/to/the/base/model"
    lines = ["import fdu.embedded"] if embedded else [f"from diffusers import {pipeline_class}"]
    if format == "delta":
        lines += ["from fdu.weights import load_weights"]
    load = "fdu.embedded.load_pipeline()" if embedded else f'{pipeline_class}.from_pretrained("{place}")'
    lines += ["", f"pipeline = {load}"]
    lines += {
        "lora": ['pipeline.load_lora_weights("path/to/this/folder")'],
        "kohya": [f'pipeline.load_lora_weights("path/to/this/folder", weight_name="{KOHYA_FILE}")'],
        "delta": ['load_weights(pipeline, "path/to/this/folder")'],
    }[format]
    return "\n".join(lines)


def _advice(format: Format, train_method: str) -> list[str]:
    """What else to know for loading."""
    if format == "kohya":
        advice = [
            f"For ComfyUI, Forge or AUTOMATIC1111 put `{KOHYA_FILE}` into the folder for LoRAs, under a name you like, "
            "and load it at strength 1."
        ]
        if train_method == "dora":
            advice += [
                "It is a DoRA with a magnitude an output. diffusers' own loader leaves these out, and AUTOMATIC1111 "
                "and ComfyUI take them differently: use the code above, or a program that follows LyCORIS."
            ]
        return advice
    if format == "delta":
        return [
            "It is applied to the base model in the dtype that it was trained in; the result is the same bit for bit."
        ]
    return []


def _line(text: str) -> str:
    """Text in one line that breaks no table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("`", "'")
