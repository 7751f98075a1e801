"""``fdu divergences``: list the divergences as a table, as JSON, or as the page docs/divergences.md."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, ClassVar

COLUMNS = {
    "name": "name",
    "generator": "f(u)",
    "profile": "between Gaussians: h(s)",
    "slope": "h'(0)",
    "range": "range",
}
"""Columns of the table and their headings; aliases and advice have a line of their own."""
EXPLANATION = (
    "h(s) is the divergence of two Gaussians at squared Mahalanobis distance s. Training divides it by h'(0), or by\n"
    "h'(1) if h'(0) is 0 or infinite, so learning rate and preservation weight mean the same for every divergence.\n"
    "A parameter follows the name, as in --divergence alpha:0.3."
)


@dataclasses.dataclass
class Divergences:
    """List the divergences that --divergence takes."""

    examples: ClassVar[tuple[str, ...]] = ("fdu divergences", "fdu divergences --json")

    json: bool = False
    """Print JSON instead of a table."""
    markdown: bool = False
    """Print the page docs/divergences.md instead."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Return the work; there is nothing to check."""

        def work() -> None:
            found = rows()
            print(json.dumps(found, indent=1) if self.json else page(found) if self.markdown else table(found))

        return work


def rows() -> list[dict[str, Any]]:
    """Name, parameter, aliases, generator, Gaussian profile, slope, range and advice of each divergence, for JSON.

    ``slope_at_zero`` and the ends of ``range`` are None if infinite, which JSON cannot express. If a divergence has a
    parameter, profile, slope and range are those of its default, which ``name`` shows.
    """
    from fdu_kernels import divergences, get_divergence
    from fdu_kernels.catalogue import FAMILIES

    return [
        {
            "name": str(one),
            "parameter": FAMILIES[one.name].parameter if one.name in FAMILIES else None,
            "aliases": list(one.aliases),
            "generator": one.formula,
            "profile": _profile(one.exponential),
            "slope_at_zero": _finite(one.slope_at_zero),
            "range": [0.0, _finite(one.upper)],
            "advice": one.advice,
        }
        for one in map(get_divergence, divergences())
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    cells = [{**row, "slope": _number(row["slope_at_zero"]), "range": _interval(*row["range"])} for row in rows]
    widths = {key: max(len(heading), *(len(cell[key]) for cell in cells)) for key, heading in COLUMNS.items()}
    lines = ["  ".join(heading.ljust(widths[key]) for key, heading in COLUMNS.items()).rstrip()]
    for cell in cells:
        lines.append("  ".join(cell[key].ljust(widths[key]) for key in COLUMNS).rstrip())
        lines.append(f"    {cell['advice']}")
        parameter = f"parameter {cell['parameter']}; " if cell["parameter"] else ""
        lines.append(f"    {parameter}also called {', '.join(cell['aliases'])}")
    return "\n".join([*lines, "", EXPLANATION])


def page(rows: list[dict[str, Any]]) -> str:
    """The rows as a page of Markdown."""
    lines = [
        "# Divergences\n",
        "`fdu divergences --markdown > docs/divergences.md` writes this page from `fdu_kernels/catalogue.py`.\n",
        "u = p/q is the density ratio. h(s) is the divergence of two Gaussians at squared Mahalanobis distance s.",
        "Training divides it by h'(0), or by h'(1) if h'(0) is 0 or infinite. [mathematics.md](mathematics.md)",
        "derives h. A parameter follows the name, as in `alpha:0.3`; the row shows its default.\n",
        "| name | f(u) | h(s) | h'(0) | range | also called | when to use it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        texts = (row["generator"], row["profile"], _number(row["slope_at_zero"]), _interval(*row["range"]))
        cells = (f"`{row['name']}`", *texts, ", ".join(row["aliases"]), row["advice"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _profile(exponential: tuple[float, float] | None) -> str:
    """c expm1(k s) / k as a formula."""
    if exponential is None:
        return "tabulated"
    c, k = exponential
    if k == 0:
        return _times(c, "s")
    body = f"1 - exp(-{_times(-k, 's')})" if k < 0 else f"exp({_times(k, 's')}) - 1"
    return body if c == abs(k) else _times(c / abs(k), f"({body})")


def _times(factor: float, term: str) -> str:
    return term if factor == 1 else f"{factor:.4g} {term}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(lower: float, upper: float | None) -> str:
    return f"[{lower:g}, {_number(upper)}{')' if upper is None else ']'}"


def _number(value: float | None) -> str:
    return "inf" if value is None else f"{value:.4g}"
