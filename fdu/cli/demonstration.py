"""The demonstration: erase a concept from the embedded pipeline, judge it, and keep figures, report and picture."""

from __future__ import annotations

from pathlib import Path

from fdu.concepts import Pair
from fdu.config import EraseConfig
from fdu.erasure import erase
from fdu.evaluation import JUDGED_SEED, Evaluation, Probe, draw, evaluate
from fdu.report import IMAGES_FOLDER, PICTURE, REPORT, Conditions, EvaluatedRun, write_run
from fdu.storage.loading import describe_device
from fdu.storage.output import METRICS_FILE, check_output, whole_folder, written_by_fdu
from fdu.subjects.subject import Subject

WEIGHTS = "erased"
"""What a demonstration's folder holds beside metrics, images and report."""


def check_demo_output(folder: str | Path) -> None:
    """As :func:`fdu.storage.output.check_output`, but the output of a former demonstration may be replaced.

    Raises:
        FileExistsError: the folder holds anything else.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        strangers = {path.name for path in folder.iterdir()} - {METRICS_FILE, REPORT, PICTURE, IMAGES_FOLDER, WEIGHTS}
        if strangers or not written_by_fdu(folder):
            found = f"holds {sorted(strangers)[0]!r}, which" if strangers else "is not empty and"
            raise FileExistsError(
                f"output folder {str(folder)!r} {found} was not written by a demo; choose another with --out"
            )
    check_output(folder, overwrite=True)


def run_demo(
    out: str | Path,
    model: Subject,
    pair: Pair,
    config: EraseConfig,
    images_per_class: int = 32,
    device: str = "cpu",
    command: str = "",
) -> tuple[Evaluation, list[Probe]]:
    """Erase one concept, compare before and after, and write the folder ``out`` as a whole.

    Args:
        out: the folder; it must be empty or a former demonstration's.
        model: what to erase from.
        pair: target and anchor, of :meth:`Subject.pairs`.
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
        result = erase(model.load(device=device), *pair, config=config)
        panel = model.exam(pair[0].name).panel(device)
        probes = panel.probes
        seed, drawn = config.seed + JUDGED_SEED, model.sampling.settings()
        with result.original() as original:
            before = draw(original, probes, images_per_class, seed, **drawn, description="before")
        after = draw(result.pipeline, probes, images_per_class, seed, **drawn, description="after")
        evaluation = evaluate(before, after, probes, panel.features)
        result.save(folder / WEIGHTS)
        told = (result.record(), command, describe_device(device), model.notes)
        dtype = str(result.pipeline.dtype).removeprefix("torch.")
        conditions = Conditions(seed, model.sampling, panel.judge, dtype)
        write_run(folder, EvaluatedRun.of(evaluation, probes, before, after, *told, conditions=conditions))
    return evaluation, probes
