"""The folder of a report: figures, images, the page and the picture."""

from __future__ import annotations

from pathlib import Path

from fdu.report.content import EvaluatedRun
from fdu.report.pictures import save_before_after
from fdu.report.render import render
from fdu.storage.output import whole_file, write_text

REPORT, PICTURE = "report.html", "before-after.png"
"""The files of a report."""


def write_report(path: str | Path, run: EvaluatedRun) -> Path:
    """Write only the page of a run, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    write_text(path, render(run))
    return path


def write_run(folder: Path, run: EvaluatedRun) -> None:
    """Write metrics, images, page and picture of a run into a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    run.write(folder)
    make_report(folder)


def make_report(folder: str | Path) -> Path:
    """Regenerate page and picture from a folder that :meth:`EvaluatedRun.write` wrote, each whole or not at all.

    Raises:
        FileNotFoundError, ValueError: not such a folder, or parts of it are missing or wrong.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    run = EvaluatedRun.read(folder)
    page = render(run)
    with whole_file(folder / REPORT) as page_file, whole_file(folder / PICTURE) as picture_file:
        page_file.write_text(page, encoding="utf-8")
        save_before_after(picture_file, run.draws("before"), run.draws("after"), run.probes, run.evaluation)
    return folder / REPORT
