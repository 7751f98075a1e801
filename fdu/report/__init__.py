"""The report of a run: one self-contained page, and pictures; made from what the run left, so also made anew."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdu.evaluation import Draws, Evaluation, Probe
from fdu.pictures import save_before_after
from fdu.report.page import render
from fdu.report.run import IMAGES_FOLDER, Run, check_run

__all__ = ["IMAGES_FOLDER", "PICTURE", "REPORT", "Run", "check_run", "make_report", "render", "write_report"]

REPORT, PICTURE = "report.html", "before-after.png"
"""What a report consists of."""


def write_report(
    path: str | Path,
    evaluation: Evaluation,
    probes: Sequence[Probe],
    before: Draws,
    after: Draws,
    record: Mapping[str, Any] | None = None,
    command: str = "",
    device: str = "",
    notes: Sequence[str] = (),
    robustness: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page alone.

    Args:
        path: the file to write.
        evaluation: the figures of ``before`` and ``after``.
        probes: what was drawn, in the order of the draws.
        before, after: the images of every probe, [N, 3, H, W] in [0, 1].
        record: :meth:`fdu.ErasureResult.record`, or the ``fdu.json`` beside saved weights. Without it the page has no
            course of the training and no settings.
        command: the command line that makes this page again.
        device: what it ran on, in words.
        notes: paragraphs to end with, such as the source of the data.
        robustness: :meth:`fdu.robustness.Robustness.as_dict`.

    Raises:
        ValueError: the draws do not belong to the probes.
        OSError: the file cannot be written.
    """
    page = render(Run.of(evaluation, probes, before, after, record, command, device, notes, robustness))
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def make_report(folder: str | Path) -> Path:
    """Make page and picture of a run's folder, of what :meth:`Run.write` left in it; each appears whole.

    Raises:
        FileNotFoundError, ValueError: it is no such folder, or parts of it are missing or wrong.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    run = Run.read(folder)
    page = render(run)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=folder) as fresh:
        (Path(fresh) / REPORT).write_text(page, encoding="utf-8")
        save_before_after(Path(fresh) / PICTURE, run.draws("before"), run.draws("after"), run.probes, run.evaluation)
        for name in (REPORT, PICTURE):
            os.replace(Path(fresh) / name, folder / name)
    return folder / REPORT
