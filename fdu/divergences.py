"""The catalogue of divergences, as a table to read and as rows for JSON."""

from __future__ import annotations

import math
from typing import Any

from fdu_kernels.catalogue import CATALOGUE, Entry
from fdu_kernels.profiles import ElementaryProfile, KinkedProfile, Profile

COLUMNS = {"name": "name", "profile": "between Gaussians: h(s)", "slope": "h'(0)", "range": "range"}
"""Columns of the table and their headings; aliases and advice have lines of their own."""
EXPLANATION = (
    "h(s): the divergence of two Gaussians at squared Mahalanobis distance s. The training divides it by h'(0) (by h'(1)\n"
    "where that is 0 or infinite), so that learning rate and preservation weight mean the same for all.\n"
    "A parameter follows the name after a colon, as in --divergence alpha:0.3."
)


def rows() -> list[dict[str, Any]]:
    """Name, parameter, aliases, generator, Gaussian profile, slope, range and advice of each divergence, for JSON.

    ``slope_at_zero`` is None where it is infinite, which JSON cannot say. Where a divergence has a parameter, profile, slope and range are those of its usual value, which ``name`` shows.
    """
    return [_row(entry) for entry in CATALOGUE]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    cells = [{**row, "slope": "inf" if row["slope_at_zero"] is None else f"{row['slope_at_zero']:g}"} for row in rows]
    widths = {key: max(len(heading), *(len(cell[key]) for cell in cells)) for key, heading in COLUMNS.items()}
    lines = ["  ".join(heading.ljust(widths[key]) for key, heading in COLUMNS.items()).rstrip()]
    for cell in cells:
        lines.append("  ".join(cell[key].ljust(widths[key]) for key in COLUMNS).rstrip())
        parameter = f" Parameter: {cell['parameter']}." if cell["parameter"] else ""
        lines.append(f"    {cell['advice']}{parameter} Also: {', '.join(cell['aliases'])}.")
    return "\n".join([*lines, "", EXPLANATION])


def _row(entry: Entry) -> dict[str, Any]:
    divergence = entry.make() if entry.example is None else entry.make(entry.example)
    return {
        "name": divergence.key,
        "parameter": entry.parameter,
        "aliases": list(entry.aliases),
        "generator": divergence.formula,
        "profile": _profile(divergence.gaussian),
        "slope_at_zero": divergence.slope_at_zero if math.isfinite(divergence.slope_at_zero) else None,
        "range": divergence.range,
        "advice": divergence.advice,
    }


def _profile(profile: Profile) -> str:
    """A Gaussian profile as a formula."""
    if isinstance(profile, ElementaryProfile):
        if profile.k == 0:
            return _times(profile.c, "s")
        power = f"exp({'-' if profile.k < 0 else ''}{_times(abs(profile.k), 's')})"
        factor, body = profile.c / abs(profile.k), f"1 - {power}" if profile.k < 0 else f"{power} - 1"
        return body if factor == 1 else _times(factor, f"({body})")
    if isinstance(profile, KinkedProfile):
        return "erf(sqrt(s/8))" if profile.threshold == 1 else "two normal distributions"
    return "tabulated"


def _times(factor: float, term: str) -> str:
    return term if factor == 1 else f"{factor:.4g} {term}"
