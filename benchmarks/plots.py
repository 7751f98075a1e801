"""The figures of docs/performance.md, drawn from records; the same numbers give the same file.

Needs matplotlib, of the extra "plots".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

Line = Sequence[tuple[float, float]]
STYLE = {"font.size": 9, "svg.hashsalt": "fdu", "axes.spines.top": False, "axes.spines.right": False}
COLOURS = {
    "clone": "0.6", "eager": "tab:red", "compiled": "tab:orange", "torch": "tab:brown", "cpu": "tab:blue",
    "triton": "tab:green", "cuda": "tab:purple",
    "autograd": "tab:pink", "value_and_grad": "navy", "into_buffer": "tab:cyan",
}  # fmt: skip
"""By the first word of a competitor's name, the same in every figure."""


def lines(lines: Mapping[str, Line], path: Path, log: str = "xy", limit: float | None = None, **labels: Any) -> None:
    """A line per competitor.

    Args:
        log: the axes with a logarithmic scale.
        limit: a height to mark.
        labels: what Axes.set takes.
    """
    figure, axes = _axes()
    for name, line in lines.items():
        axes.plot([x for x, _ in line], [y for _, y in line], marker=".", label=name, **_colour(name))
    if limit is not None:
        axes.axhline(limit, color="0.6", linewidth=0.8, linestyle=":")
    for axis in log:
        axes.set(**{f"{axis}scale": "log"})
    if "y" not in log:
        axes.set(ylim=(0, None))
    _save(figure, axes, path, **labels)


def stacked(rows: Mapping[str, Mapping[str, float]], path: Path, **labels: Any) -> None:
    """A bar per row, of its parts side by side."""
    figure, axes = _axes(height=0.9 + 0.35 * len(rows))
    left = [0.0] * len(rows)
    for part in next(iter(rows.values())):
        widths = [row[part] for row in rows.values()]
        axes.barh(list(rows), widths, left=left, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    _save(figure, axes, path, **labels)


def grouped(rows: Mapping[str, Mapping[str, float]], path: Path, **labels: Any) -> None:
    """A group of bars per row, a bar per competitor."""
    figure, axes = _axes()
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place + number * width for place in range(len(rows))]
        style = {**_colour(name), **({"alpha": 0.5} if name.endswith("autograd") else {})}
        axes.bar(places, [row.get(name, 0.0) for row in rows.values()], width, label=name, **style)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(rows))], list(rows))
    _save(figure, axes, path, **labels)


def _axes(height: float = 3.2) -> tuple[Any, Any]:
    plt.rcParams.update(STYLE)
    return plt.subplots(figsize=(6.4, height))


def _colour(name: str) -> dict[str, Any]:
    first = name.split()[0]
    return {"color": COLOURS[first]} if first in COLOURS else {}


def _save(figure: Any, axes: Any, path: Path, **labels: Any) -> None:
    axes.set(**labels)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
