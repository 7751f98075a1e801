"""The model card next to saved weights: the erasure, how to load it, its figures and its limits.

An evaluation fills in the figures, also later; the rest of the card then stays, as its readers may have changed it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from jinja2 import Template

from fdu.config import PLACES, TRAIN_METHODS
from fdu.evaluation import Draws, Evaluation, Probe
from fdu.evaluation.intervals import uncertainty
from fdu.evaluation.robustness.holding import judge_robustness
from fdu.evaluation.tables import Row, comparison
from fdu.evaluation.verdict import judge, percent
from fdu.report.pictures import before_after, strip
from fdu.report.render import templates
from fdu.report.run import IMAGES_FOLDER, SIDES, EvaluatedRun
from fdu.storage.foreign import parse_yaml, printable
from fdu.storage.formats import Format
from fdu.storage.kohya import KOHYA_FILE, kohya_names
from fdu.storage.loading import HUB_ID, erased_pairs
from fdu.storage.output import RECORD_FILE, write_text
from fdu.storage.single_file import SingleFile
from fdu.subjects.registry import find_subject

CARD_FILE = "README.md"
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
FIGURES = re.compile(r"^## Figures\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
"""The section of the figures, up to the next heading of its level."""
UNMEASURED = "Not measured."
LICENCE = ("license", "license_name", "license_link")
"""The entries of a card that state a licence."""
PICTURES = f"{IMAGES_FOLDER}/card-*.png"
"""The pictures of a card, as a pattern."""
SHOWN_PROMPTS, SHOWN_CLASSES = 2, 2
"""Prompts of the target, and retained classes, with a picture each."""
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
    config = record["config"]
    subject = find_subject(str(pipeline.config.get("_name_or_path", "")))
    base_id = record["base"] if HUB_ID.fullmatch(record["base"]) and not subject.title else None
    dora = TRAIN_METHODS[config["train_method"]].result == "dora"
    adapter = format in ("lora", "kohya")
    front = {
        **({"base_model": base_id, "base_model_relation": "adapter" if adapter else "finetune"} if base_id else {}),
        **_licence_beside(str(pipeline.config.get("_name_or_path", "")), base_id),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": [*(["lora"] if adapter else []), "concept-erasure", "machine-unlearning", "text-to-image"],
    }
    page = _template("card.md.j2").render(
        record=record,
        format=format,
        front=_dumped(front),
        figures=_figures(evaluation, probes),
        adapter=adapter,
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
    )
    path = Path(folder) / CARD_FILE
    path.write_text(page, encoding="utf-8")
    return path


def fill_in(folder: str | Path, run: EvaluatedRun, pictures: bool = True) -> Path:
    """Write the figures of an evaluation, and its pictures, into the card of a saved erasure.

    Args:
        folder: the saved erasure.
        run: its evaluation.
        pictures: show images before and after, which then lie in the folder and stand in the metadata's ``widget``;
            otherwise those of an earlier evaluation go.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_card`.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    front, body = read_card(folder)
    front.pop("widget", None)
    for path in folder.glob(PICTURES):
        path.unlink()
    if pictures:
        (folder / IMAGES_FOLDER).mkdir(exist_ok=True)
        draws = [Draws(run.images[side]) for side in SIDES]
        before_after(draws[0], draws[1], run.asked, run.evaluation).save(folder / PICTURES.replace("*", "overview"))
        front["widget"] = [
            {"text": prompt, "output": {"url": _pair(folder, run, place, image)}}
            for place, image, prompt in _examples(run)
        ]
    section = _figures(run.evaluation, run.asked, run, PICTURES.replace("*", "overview") if pictures else "")
    filled, found = FIGURES.subn(lambda _: section, body, count=1)
    _write(folder, front, filled if found else f"{body.rstrip()}\n\n{section}")
    return folder / CARD_FILE


def read_card(folder: str | Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of the card of a saved erasure.

    Raises:
        FileNotFoundError: no erasure that fdu saved, or no card.
        ValueError: the card does not begin with metadata in YAML.
    """
    for name in (RECORD_FILE, CARD_FILE):
        if not (Path(folder) / name).is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no {name}; give a folder that `fdu erase` wrote")
    path = Path(folder) / CARD_FILE
    try:
        return _parts(path)
    except ValueError as error:
        raise ValueError(f"the metadata of {str(path)!r} cannot be read ({error}); correct it") from error


def _parts(path: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of any card; raises ValueError without metadata."""
    text = path.read_text(encoding="utf-8")
    found = FRONT_MATTER.match(text)
    front = parse_yaml(found[1]) if found else None
    if not found or not isinstance(front, dict):
        raise ValueError("it must begin with --- and metadata")
    return front, text[found.end() :]


def is_evaluated(folder: str | Path) -> bool:
    """Whether the card of a saved erasure holds figures; raises as :func:`read_card`."""
    section = FIGURES.search(read_card(folder)[1])
    return section is not None and UNMEASURED not in section[0]


def write_licence(folder: str | Path, base: Mapping[str, Any]) -> None:
    """Take the licence of the base model into the card, unless this has one.

    Args:
        folder: the saved erasure.
        base: the metadata of the base model's card.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_card`.
    """
    front, body = read_card(folder)
    licence = _licence(base, str(front.get("base_model", "")))
    if licence and not any(name in front for name in LICENCE):
        _write(Path(folder), {**licence, **front}, body)


def _write(folder: Path, front: Mapping[str, Any], body: str) -> None:
    """Write a card whose metadata was read."""
    write_text(folder / CARD_FILE, f"---\n{_dumped(front)}---\n{body.rstrip()}\n")


def _licence(front: Mapping[str, Any], base_id: str | None) -> dict[str, str]:
    """The entries of a card's metadata that state its licence; links are those of the base model's repository."""
    found = {name: front[name] for name in LICENCE if isinstance(front.get(name), str)}
    link = found.get("license_link", "")
    if link and base_id and not re.match(r"[a-z]+:", link):
        found["license_link"] = f"https://huggingface.co/{base_id}/blob/main/{link.removeprefix('./')}"
    return found


def _licence_beside(place: str, base_id: str | None) -> dict[str, str]:
    """The licence in the card of a base that lies in a folder; empty if it says none."""
    try:
        return _licence(_parts(Path(place) / CARD_FILE)[0], base_id) if place else {}
    except (OSError, ValueError):
        return {}


def _template(name: str) -> Template:
    environment = templates()
    environment.filters.update(percent=percent, code=_code, prose=_prose, literal=_literal)
    return environment.get_template(name)


def _dumped(front: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True, width=120)


def _figures(
    evaluation: Evaluation | None, probes: Sequence[Probe], run: EvaluatedRun | None = None, picture: str = ""
) -> str:
    """The section of the figures."""
    rows = comparison(evaluation, probes) if evaluation is not None else []
    found: dict[str, Any] = {"rows": rows, "unmeasured": UNMEASURED, "picture": picture, "holds": None, "facts": []}
    if evaluation is not None:
        found |= {
            "images": evaluation.images_per_class,
            "uncertainty": percent(_reach(rows, evaluation.images_per_class)),
            "verdict": " ".join(judge(evaluation, probes).sentences),
        }
    if run is not None:
        told = {"The judge": run.conditions.judge, "The prompts": run.conditions.prompts}
        found["facts"] = [(name, text) for name, text in told.items() if text]
        found["holds"] = judge_robustness(run.robustness, run.targets[0]) if run.robustness else None
    return _template("figures.md.j2").render(**found).strip() + "\n\n"


def _examples(run: EvaluatedRun) -> list[tuple[int, int, str]]:
    """Places of a probe and of an image of it, with the prompt: of the target, then of retained classes."""
    targets = [place for place, one in enumerate(run.probes) if one.role == "target"][:1]
    retained = [place for place, one in enumerate(run.probes) if one.role == "retained"][:SHOWN_CLASSES]
    shown = [(place, image) for place in targets for image in range(SHOWN_PROMPTS)]
    shown += [(place, 0) for place in retained]
    return [
        (place, image, " ".join(run.probes[place].prompts[image].split()))
        for place, image in shown
        if image < min(len(run.probes[place].prompts), len(run.images["before"][place]))
    ]


def _pair(folder: Path, run: EvaluatedRun, place: int, image: int) -> str:
    """Write one image before and after, side by side; returns its path in the folder."""
    name = PICTURES.replace("*", f"{place:02d}-{image}")
    pair = torch.stack([run.images[side][place][image] for side in SIDES])
    strip(pair, gap=4, height=pair.shape[2]).save(folder / name, optimize=True)
    return name


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
