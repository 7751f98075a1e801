"""The report of a run: one self-contained page, and pictures; made from what the run left, so also made anew."""

from __future__ import annotations

from pathlib import Path

from fdu.output import whole_file, write_text
from fdu.pictures import save_before_after
from fdu.report.page import render
from fdu.report.run import IMAGES_FOLDER, Run
from fdu.report.stored import Conditions, check_record, check_run

__all__ = [
    "IMAGES_FOLDER",
    "PICTURE",
    "REPORT",
    "Conditions",
    "Run",
    "check_record",
    "check_run",
    "make_report",
    "render",
    "write_report",
    "write_run",
]

REPORT, PICTURE = "report.html", "before-after.png"
"""What a report consists of."""


def write_report(path: str | Path, run: Run) -> Path:
    """Write the page of a run alone, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    write_text(path, render(run))
    return path


def write_run(folder: Path, run: Run) -> None:
    """Write metrics, images, page and picture of a run into a folder.

    Raises:
        OSError: they cannot be written.
    """
    run.write(folder)
    make_report(folder)


def make_report(folder: str | Path) -> Path:
    """Make page and picture of a run's folder, of what :meth:`Run.write` left in it; each appears whole.

    Raises:
        FileNotFoundError, ValueError: it is no such folder, or parts of it are missing or wrong.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    run = Run.read(folder)
    page = render(run)
    with whole_file(folder / REPORT) as page_file, whole_file(folder / PICTURE) as picture_file:
        page_file.write_text(page, encoding="utf-8")
        save_before_after(picture_file, run.draws("before"), run.draws("after"), run.probes, run.evaluation)
    return folder / REPORT
