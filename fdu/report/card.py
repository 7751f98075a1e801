"""The model card beside saved weights: the erasure, how to load it, its figures and its limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from fdu.config import PLACES, TRAIN_METHODS
from fdu.evaluation import Evaluation, Probe
from fdu.evaluation.verdict import comparison, judge, percent, uncertainty
from fdu.report.templating import templates
from fdu.storage.kohya import KOHYA_FILE
from fdu.storage.loading import HUB_ID
from fdu.storage.writers import Format
from fdu.subjects.registry import find_subject
from fdu.subjects.subject import Subject

CARD_FILE = "README.md"
WHAT = {
    "lora": "A LoRA adapter",
    "kohya": "A LoRA adapter in kohya's names",
    "pipeline": "A full pipeline",
    "delta": "The changed weights of a pipeline",
}


def write_card(
    folder: str | Path,
    format: Format,
    pipeline: DiffusionPipeline,
    record: Mapping[str, Any],
    evaluation: Evaluation | None = None,
    probes: Sequence[Probe] = (),
) -> Path:
    """Write README.md with the front matter of the Hugging Face hub. It contains no path of this machine.

    Args:
        folder: where :func:`fdu.storage.writers.write` wrote the weights.
        format: their format.
        pipeline: the pipeline with the erasure.
        record: :meth:`fdu.ErasureResult.record`.
        evaluation: the figures, if any.
        probes: the probes of the evaluation.
    """
    environment = templates()
    environment.filters.update(percent=percent, line=_line)
    config = record["config"]
    subject = find_subject(str(pipeline.config.get("_name_or_path", "")))
    base_id = record["base"] if HUB_ID.fullmatch(record["base"]) and not subject.title else None
    rows: dict[str, Any] = {"rows": []}
    if evaluation is not None:
        rows = {
            "rows": comparison(evaluation, probes),
            "images": evaluation.images_per_class,
            "uncertainty": percent(uncertainty(evaluation.images_per_class)),
            "verdict": " ".join(judge(evaluation, probes).sentences),
        }
    page = environment.get_template("card.md.j2").render(
        record=record,
        format=format,
        adapter=format in ("lora", "kohya"),
        title=_line(record["target"]["name"]),
        base=subject.title or _line(record["base"]) or "an unnamed model",
        base_id=base_id,
        what=WHAT[format],
        concepts=record.get("concepts") or [[record["target"]["name"], record["anchor"]["name"]]],
        pipeline_class=type(pipeline).__name__,
        code=_code(format, pipeline, config["train_method"], base_id, subject),
        advice=_advice(format, config["train_method"]),
        settings=[
            (name, _line(json.dumps(value, ensure_ascii=False))) for name, value in config.items() if name not in PLACES
        ],
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        **rows,
    )
    path = Path(folder) / CARD_FILE
    path.write_text(page, encoding="utf-8")
    return path


def _code(format: Format, pipeline: DiffusionPipeline, train_method: str, base_id: str | None, subject: Subject) -> str:
    """Python code that loads the weights."""
    if format == "pipeline":
        return (
            "from diffusers import DiffusionPipeline\n\n"
            'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype="auto")'
        )
    by_fdu = format == "delta"
    if format == "kohya":  # diffusers reads no magnitudes, and no SD3, in these names
        by_fdu = TRAIN_METHODS[train_method].result == "dora" or isinstance(pipeline, StableDiffusion3Pipeline)
    family = type(pipeline).__name__
    base = f'{family}.from_pretrained("{base_id or "path/to/the/base/model"}")'
    lines = ["import fdu"] if by_fdu or subject.title else []
    lines += [] if subject.title else [f"from diffusers import {family}"]
    lines += ["", f"pipeline = {subject.loading_code if subject.title else base}"]
    if by_fdu:
        lines += ['fdu.load_weights(pipeline, "path/to/this/folder")']
    else:
        name = f', weight_name="{KOHYA_FILE}"' if format == "kohya" else ""
        lines += [f'pipeline.load_lora_weights("path/to/this/folder"{name})']
    return "\n".join(lines)


def _advice(format: Format, train_method: str) -> list[str]:
    """Advice on loading."""
    if format == "delta":
        return ["If the base is loaded in the dtype of the training, the result is the erased model bit for bit."]
    if format != "kohya":
        return []
    advice = [
        f"For ComfyUI, Forge or AUTOMATIC1111, put `{KOHYA_FILE}` into the LoRA folder under any name and load it at "
        "strength 1."
    ]
    if TRAIN_METHODS[train_method].result == "dora":
        advice += [
            "It is a DoRA with one magnitude per output, in LyCORIS's format. diffusers drops the magnitudes, and "
            "AUTOMATIC1111 and ComfyUI read them differently: use the code above or a program that follows LyCORIS."
        ]
    return advice


def _line(text: str) -> str:
    """Text in one line, safe in a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
