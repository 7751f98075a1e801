"""The model card beside saved weights: what was erased, how to load it, what was measured, what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from fdu.config import PLACES
from fdu.evaluation import Evaluation, Probe
from fdu.evaluation.verdict import comparison, judge, percent, uncertainty
from fdu.models.loading import HUB_ID
from fdu.report.templating import templates
from fdu.storage.kohya import KOHYA_FILE
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
    """Write README.md, with the front matter that the Hugging Face hub reads. It names no place on this machine.

    Args:
        folder: where :func:`fdu.storage.writers.write` wrote.
        format: in this format.
        pipeline: the pipeline with the erasure.
        record: :meth:`fdu.ErasureResult.record`.
        evaluation: the figures, if there are any.
        probes: what was drawn for them.
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
    """The lines of Python that load the weights."""
    if format == "pipeline":
        return (
            "from diffusers import DiffusionPipeline\n\n"
            'pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", dtype="auto")'
        )
    by_fdu = format == "delta"
    if format == "kohya":  # diffusers reads no magnitudes, and no SD3, in these names
        by_fdu = train_method == "dora" or isinstance(pipeline, StableDiffusion3Pipeline)
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
    """What else to know for loading."""
    if format == "delta":
        return ["Loaded in the dtype that it was trained in, the base becomes the erased model bit for bit."]
    if format != "kohya":
        return []
    advice = [
        f"For ComfyUI, Forge or AUTOMATIC1111 put `{KOHYA_FILE}` into the folder for LoRAs, under a name you like, and "
        "load it at strength 1."
    ]
    if train_method == "dora":
        advice += [
            "It is a DoRA with one magnitude an output, as LyCORIS writes it. diffusers' own loader leaves these out, "
            "AUTOMATIC1111 and ComfyUI take them differently: use the code above or a program that follows LyCORIS."
        ]
    return advice


def _line(text: str) -> str:
    """Text in one line that breaks no table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
