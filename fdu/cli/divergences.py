"""``fdu divergences``: list the divergences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import ClassVar


@dataclasses.dataclass
class Divergences:
    """List the divergences that --divergence takes."""

    examples: ClassVar[tuple[str, ...]] = ("fdu divergences", "fdu divergences --json")

    json: bool = False
    """Print JSON instead of a table."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Nothing to check; the work is what comes back."""

        def work() -> None:
            from fdu.divergences import rows, table

            print(json.dumps(rows(), indent=1) if self.json else table(rows()))

        return work
