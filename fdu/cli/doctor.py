"""``fdu doctor``: check whether fdu can run here, and say how to fix what is missing."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import ClassVar

from fdu.cli.exits import FAILED


@dataclasses.dataclass
class Doctor:
    """Check whether fdu can run here: versions, devices, kernels, disk; and say how to fix what is missing.

    Exits with 0 if fdu can run and with 1 if not.
    """

    examples: ClassVar[tuple[str, ...]] = ("fdu doctor",)

    def prepare(self, command: str) -> Callable[[], None]:
        """Nothing to check; the work is what comes back."""

        def work() -> None:
            from fdu.doctor import examine, healthy, render

            findings = examine()
            print(render(findings))
            if not healthy(findings):
                sys.exit(FAILED)

        return work
