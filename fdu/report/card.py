"""The model card next to saved weights: the erasure, how to load it, its figures and its limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fdu.config import PLACES, TRAIN_METHODS
from fdu.evaluation import Evaluation, Probe
from fdu.evaluation.intervals import uncertainty
from fdu.evaluation.tables import Row, comparison
from fdu.evaluation.verdict import judge, percent
from fdu.report.render import templates
from fdu.storage.foreign import printable
from fdu.storage.formats import Format
from fdu.storage.kohya import KOHYA_FILE, kohya_names
from fdu.storage.loading import HUB_ID, erased_pairs
from fdu.storage.single_file import SingleFile
from fdu.subjects.registry import find_subject

CARD_FILE = "README.md"
MARKUP = re.compile(r"(?<!\w)_|_(?!\w)|[\\`*\[\]|~$]")
"""Characters that Markdown, or GitHub's or the hub's, may read as markup; within words an underscore is none."""
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
        folder: where :func:`fdu.storage.formats.write` wrote the weights.
        format: their format.
        pipeline: the pipeline with the erasure.
        record: :meth:`fdu.ErasureResult.record`.
        evaluation: the figures, if any.
        probes: the probes of the evaluation.
    """
    environment = templates()
    environment.filters.update(percent=percent, code=_code, prose=_prose, literal=_literal)
    config = record["config"]
    subject = find_subject(str(pipeline.config.get("_name_or_path", "")))
    base_id = record["base"] if HUB_ID.fullmatch(record["base"]) and not subject.title else None
    dora = TRAIN_METHODS[config["train_method"]].result == "dora"
    rows: dict[str, Any] = {"rows": []}
    if evaluation is not None:
        lines = comparison(evaluation, probes)
        rows = {
            "rows": lines,
            "images": evaluation.images_per_class,
            "uncertainty": percent(_reach(lines, evaluation.images_per_class)),
            "verdict": " ".join(judge(evaluation, probes).sentences),
        }
    page = environment.get_template("card.md.j2").render(
        record=record,
        format=format,
        adapter=format in ("lora", "kohya"),
        title=record["target"]["name"],
        base=subject.title or record["base"] or "an unnamed model",
        base_id=base_id,
        file=_loading_file(record),
        revision=record.get("revision") or "",
        what=WHAT[format],
        adapters=list(record.get("adapters") or ()),
        concepts=erased_pairs(record),
        pipeline_class=type(pipeline).__name__,
        subject=subject,
        kohya_file=KOHYA_FILE,
        dora=dora,
        trains=TRAIN_METHODS[config["train_method"]].trains,
        # In kohya's names, diffusers reads no magnitudes, and of some families nothing, or what is inside of blocks.
        by_fdu=format == "delta" or (format == "kohya" and (dora or not kohya_names(pipeline).read_by_diffusers)),
        settings=[
            (name, json.dumps(value, ensure_ascii=False)) for name, value in config.items() if name not in PLACES
        ],
        versions=", ".join(f"{name} {number}" for name, number in record["versions"].items()),
        **rows,
    )
    path = Path(folder) / CARD_FILE
    path.write_text(page, encoding="utf-8")
    return path


def _loading_file(record: Mapping[str, Any]) -> str:
    """The Python expression that loads a base that is a single file; empty for others."""
    if not SingleFile.of(record["base"]):
        return ""
    config = record.get("model_config") or ""
    place = config if HUB_ID.fullmatch(config) else f"path/to/{config}"
    beside = f", model_config={_literal(place)}" if config else ""
    return f"fdu.load_pipeline({_literal('path/to/' + record['base'])}{beside})"


def _reach(rows: Sequence[Row], images: int) -> float:
    """How far an interval extends at most from its share.

    Where only a few prompts ask for something besides the target, it extends further than on ``images`` images.
    """
    ends = [
        abs(share - end)
        for row in rows
        if row.intervals
        for share, interval in zip((row.before, row.after), row.intervals, strict=True)
        for end in interval
    ]
    return max([uncertainty(images), *ends])


def _code(text: str) -> str:
    """Text in one line, safe in a code span of a Markdown table."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("`", "'")


def _prose(text: str) -> str:
    """Text in one line, safe anywhere in Markdown: it shows as it is, without markup, HTML, links or images."""
    shown = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(r"\\\g<0>", shown)


def _literal(text: str) -> str:
    """Text as a Python string, safe in a fenced block of code."""
    return json.dumps(" ".join(text.split()))
