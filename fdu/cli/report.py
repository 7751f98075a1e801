"""``fdu report``: make the page of a run anew from what the run left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from tyro.conf import Positional


@dataclasses.dataclass
class Report:
    """Make the report of a run: one HTML page that needs nothing else, and a picture.

    `fdu evaluate --out` and `fdu demo` make it by themselves; this makes it anew, of the figures and images that they
    left.
    """

    examples: ClassVar[tuple[str, ...]] = ("fdu report demo-out", "fdu report evaluation")

    run: Positional[Path]
    """The folder that `fdu evaluate --out` or `fdu demo` wrote. It receives report.html and before-after.png."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Check everything; the work is what comes back."""
        from fdu.report import PICTURE, check_run, make_report

        check_run(self.run)

        def work() -> None:
            path = make_report(self.run)
            print(f"report   {path}\npicture  {self.run / PICTURE}")

        return work
