"""What the checks of the theory share: claims with verdicts, and how numbers and figures are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markdown_table import markdown
from matplotlib import pyplot as plt


class Claim(NamedTuple):
    """A claim and what became of it."""

    title: str
    section: str
    """The heading of the section that checks it."""
    source: str
    """Who says so."""
    said: str
    verdict: str
    """In a few words."""
    reasons: str
    """Sentences with the numbers."""

    def text(self) -> str:
        """The paragraph of its section."""
        verdict = self.verdict[0].upper() + self.verdict[1:]
        return f"*Claim ({self.source}): {self.said}*\n\n**{verdict}.** {self.reasons}"


def listed(values: tuple[float, ...] | list[float]) -> str:
    """As "1, 2, 3"."""
    return ", ".join(f"{value:g}" for value in values)


def power(places: tuple[float, ...], values: list[float]) -> float:
    """The slope of values against places in logarithms."""
    return float(np.polyfit(np.log(places), np.log(np.abs(values)), 1)[0])


def between(values: tuple[float, ...]) -> str:
    """As "-1.04 to -0.97"."""
    return f"{min(values):.2f} to {max(values):.2f}"


ELSEWHERE = (
    ("Hellinger dominates MSE, keeps retained concepts best", "empirical: judged in [results.md](results.md)"),
    ("Variational losses erase faster and hurt more", "empirical: judged in [results.md](results.md)"),
)
"""The claims of the paper that no computation on Gaussians decides."""


def claim_table(claims: list[Claim]) -> str:
    """Claims and verdicts, with links to the sections."""
    rows = [[f"[{one.title}](#{anchor(one.section)})", one.source, one.verdict] for one in claims]
    rows += [[title, "the paper", where] for title, where in ELSEWHERE]
    return markdown(["claim", "of", "verdict"], rows)


def anchor(heading: str) -> str:
    """What GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def save(figure: Any, axes: Any, path: Path) -> None:
    """Write a figure; the same numbers give the same file."""
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.2)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
