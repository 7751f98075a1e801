"""The demonstration: erase a concept from the embedded pipeline, judge it, and keep figures, report and picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fdu import embedded
from fdu.concepts import Concept
from fdu.config import EraseConfig
from fdu.erasure import erase
from fdu.evaluation import JUDGED_SEED, Draws, Evaluation, Probe, draw, evaluate
from fdu.loading import describe_device, load_model
from fdu.output import METRICS_FILE as METRICS
from fdu.output import check_output, whole_folder, written_by_fdu
from fdu.report import IMAGES_FOLDER, PICTURE, REPORT, Run, make_report
from fdu.robustness import Robustness

WEIGHTS = "erased"
"""What a demonstration's folder holds beside metrics, images and report."""

NOTES = (
    "The images come from the pipeline that is embedded in fdu, trained from scratch on the handwritten digits of "
    "scikit-learn (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
    "Repository, CC BY 4.0), inked in one of four colours. The judge is a classifier trained on the real digits alone.",
    "The text embeddings of this small pipeline are far more separable than those of a real CLIP, so a concept can be "
    "erased here with less harm to its neighbours than in Stable Diffusion. Take these figures as a demonstration of "
    "the method and a check of the installation, not as a measure of what it does to a large model.",
)
"""What a reader of results on the embedded pipeline has to know."""
CLIP_NOTES = (
    "Counted zero-shot by an image-text encoder: an image counts as a class if the class's name lies nearer to it than "
    "other names do. The target and its neighbours are each told from the anchor, the anchor from the target; everyday "
    "and unrelated subjects from one another, the anchor and the target. Such a judge errs, before as after, so look "
    "at the pictures, and at the difference of the two.",
)
"""What a reader of results that CLIP judged has to know."""


def check_demo_output(folder: str | Path) -> None:
    """As :func:`fdu.output.check_output`, but what a former demonstration wrote may be replaced, and nothing else.

    Raises:
        FileExistsError: the folder holds anything else.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        strangers = {path.name for path in folder.iterdir()} - {METRICS, REPORT, PICTURE, IMAGES_FOLDER, WEIGHTS}
        if strangers or not written_by_fdu(folder):
            reason = f"holds {sorted(strangers)[0]!r}, which" if strangers else "is not empty, and"
            raise FileExistsError(f"output folder {str(folder)!r} {reason} no demo wrote; choose another with --out")
    check_output(folder, overwrite=True)


def run_demo(
    out: str | Path,
    target: Concept,
    anchor: Concept,
    config: EraseConfig,
    images_per_class: int = 32,
    device: str = "cpu",
    command: str = "",
) -> tuple[Evaluation, list[Probe]]:
    """Erase ``target`` from the embedded pipeline, compare before and after, and write the folder ``out`` as a whole.

    Args:
        out: the folder; it must be empty or a former demonstration's.
        target, anchor: of :func:`fdu.embedded.concepts`.
        config: the settings.
        images_per_class: images that the judge sees of every class, before and after.
        device: where to run.
        command: the command line to note as the one that makes this again.

    Raises:
        ValueError, FileExistsError, OSError: the folder is somebody else's or cannot be written.
        RuntimeError: the loss became NaN or infinite; nothing is written.
    """
    check_demo_output(out)
    with whole_folder(out, overwrite=True) as folder:
        result = erase(load_model("embedded", device=device), target, anchor, config=config)
        probes = embedded.probes(target.name)
        seed = config.seed + JUDGED_SEED
        with result.original() as original:
            before = draw(original, probes, images_per_class, seed, description="before")
        after = draw(result.pipeline, probes, images_per_class, seed, description="after")
        evaluation = evaluate(before, after, probes, "embedded")
        result.save(folder / WEIGHTS)
        write_figures(folder, evaluation, probes, before, after, result.record(), command, describe_device(device))
    return evaluation, probes


def write_figures(
    folder: Path,
    evaluation: Evaluation,
    probes: Sequence[Probe],
    before: Draws,
    after: Draws,
    record: dict[str, Any] | None,
    command: str,
    device: str,
    notes: Sequence[str] = NOTES,
    robustness: Robustness | None = None,
) -> None:
    """Write metrics, images and report of an erasure into a folder; the notes are those of the embedded pipeline."""
    found = robustness.as_dict() if robustness is not None else None
    Run.of(evaluation, probes, before, after, record, command, device, notes, found).write(folder)
    make_report(folder)


def with_preserved(config: EraseConfig, *targets: str) -> EraseConfig:
    """The settings with the embedded pipeline's own prompts to keep, unless they name some."""
    if config.preservation_prompts:
        return config
    return dataclasses.replace(config, preservation_prompts=embedded.preserved(*targets))
