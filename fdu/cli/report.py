"""``fdu report``: regenerate the page of a run from its figures and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from tyro.conf import Positional


@dataclasses.dataclass
class Report:
    """Regenerate the report of an evaluation: a self-contained HTML page and a picture.

    `fdu evaluate --out` and `fdu demo` write it too; this command uses their figures and images.
    """

    examples: ClassVar[tuple[str, ...]] = ("fdu report demo-out", "fdu report evaluation")

    run: Positional[Path]
    """Folder written by `fdu evaluate --out` or `fdu demo`. It receives report.html and before-after.png."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Check everything; the work is what comes back."""
        from fdu.report import PICTURE, check_run, make_report

        check_run(self.run)

        def work() -> None:
            path = make_report(self.run)
            print(f"report   {path}\npicture  {self.run / PICTURE}")

        return work
