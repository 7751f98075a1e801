"""The report of a run: one self-contained page, pictures, and the model card."""

from __future__ import annotations

from fdu.report.render import PICTURE, REPORT, make_report, render, write_report, write_run
from fdu.report.run import IMAGES_FOLDER, Conditions, EvaluatedRun, check_record, check_run

__all__ = [
    "IMAGES_FOLDER",
    "PICTURE",
    "REPORT",
    "Conditions",
    "EvaluatedRun",
    "check_record",
    "check_run",
    "make_report",
    "render",
    "write_report",
    "write_run",
]
