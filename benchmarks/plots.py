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

MIB = 2**20
Line = Sequence[tuple[float, float]]
STYLE = {"font.size": 9, "svg.hashsalt": "fdu", "axes.spines.top": False, "axes.spines.right": False}
COLOURS = {
    "clone": "0.6", "eager": "tab:red", "compiled": "tab:orange", "torch": "tab:brown", "cpu": "tab:blue",
    "triton": "tab:green", "cuda": "tab:purple",
    "autograd": "tab:pink", "value_and_grad": "navy", "into_buffer": "tab:cyan",
}  # fmt: skip
"""By the first word of a candidate's name, the same in every figure."""


def speed_of_light(lines: Mapping[str, Line], path: Path) -> None:
    """Share of the copy bandwidth against the bytes of a tensor, a line a candidate."""
    figure, axes = _axes()
    for name, line in lines.items():
        axes.semilogx([x / MIB for x, _ in line], [y for _, y in line], marker=".", label=name, **_colour(name))
    axes.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="MiB a tensor", ylabel="share of the copy bandwidth", ylim=(0, None))
    _save(figure, axes, path)


def latency(lines: Mapping[str, Line], path: Path) -> None:
    """Microseconds a call against the bytes of a tensor."""
    figure, axes = _axes()
    for name, line in lines.items():
        axes.loglog([x / MIB for x, _ in line], [y for _, y in line], marker=".", label=name, **_colour(name))
    axes.set(xlabel="MiB a tensor", ylabel="µs a call")
    _save(figure, axes, path)


def host_parts(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Microseconds of a call by part, a bar a backend and shape."""
    figure, axes = _axes(height=0.9 + 0.35 * len(rows))
    names = list(next(iter(rows.values())))
    left = [0.0] * len(rows)
    for part in names:
        widths = [row[part] for row in rows.values()]
        axes.barh(list(rows), widths, left=left, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="µs a call")
    _save(figure, axes, path)


def memory(rows: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Peak beyond inputs and gradients, in tensors of the inputs' size, by form and candidate."""
    figure, axes = _axes()
    candidates = list(dict.fromkeys(name for row in rows.values() for name in row))
    width = 0.8 / len(candidates)
    for number, name in enumerate(candidates):
        places = [place + number * width for place in range(len(rows))]
        colour = _colour(name)
        if name.endswith("autograd"):
            colour["alpha"] = 0.5
        axes.bar(places, [row.get(name, 0.0) for row in rows.values()], width, label=name, **colour)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(rows))], list(rows))
    axes.set(ylabel="peak beyond inputs and\ngradients, in input tensors")
    _save(figure, axes, path)


def scaling(lines: Mapping[str, Line], xlabel: str, path: Path) -> None:
    """Nanoseconds an element against ``xlabel``."""
    figure, axes = _axes()
    for name, line in lines.items():
        axes.loglog([x for x, _ in line], [y for _, y in line], marker=".", label=name, **_colour(name))
    axes.set(xlabel=xlabel, ylabel="ns an element")
    _save(figure, axes, path)


def training(rows: Mapping[str, Line], path: Path) -> None:
    """Images a second against the batch."""
    figure, axes = _axes()
    for name, line in rows.items():
        axes.plot([x for x, _ in line], [y for _, y in line], marker="o", label=name)
    axes.set(xlabel="batch", ylabel="images a second", ylim=(0, None))
    _save(figure, axes, path)


def _axes(height: float = 3.2) -> tuple[Any, Any]:
    plt.rcParams.update(STYLE)
    return plt.subplots(figsize=(6.4, height))


def _colour(name: str) -> dict[str, Any]:
    first = name.split()[0]
    return {"color": COLOURS[first]} if first in COLOURS else {}


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
