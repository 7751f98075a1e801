"""Write docs/performance.md and its figures from the records: ``python benchmarks/report.py``. Nothing is measured.

``make bench`` makes the record of the CPU. GPU records are the files gpu*.json beside it (gpu_suite.py), and
compiled.json says what the compilers make of the GPU kernels (bench_compiled.py). The words are
in pages/performance.md.j2. Needs matplotlib, of the extra "plots".
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import promises
import records
from promises import gpu_rows, job_seconds, median, name_of, rows_of
from records import HERE, Row

matplotlib.use("svg")
from matplotlib import pyplot as plt

Points = Iterable[tuple[str, float, float]]
DEVICES = {
    "A100": ("sm_80", 108, 1.41e9, 1.7e12), "H100": ("sm_90", 132, 1.755e9, 3.0e12),
    "H200": ("sm_90", 132, 1.755e9, 4.3e12), "B200": ("sm_100", 148, 1.85e9, 6.8e12),
}  # fmt: skip
"""Architecture, multiprocessors, clock in Hz, and bytes that a copy moves per second: what the predictions assume."""
ISSUED, SPECIAL = 128, 16
"""Instructions of threads that a multiprocessor issues per cycle, and of those special functions."""
PASSES = {"variational": 2, "density ratio": 2, "Gaussian, two passes": 2, "Gaussian": 3}
"""Times that a kernel reads or writes an element, by the first words of its name."""
STYLE = {"font.size": 9, "svg.hashsalt": "fdu", "axes.spines.top": False, "axes.spines.right": False}
COLOURS = {
    "clone": "0.6", "eager": "tab:red", "compiled": "tab:orange", "torch": "tab:brown", "cpu": "tab:blue",
    "triton": "tab:green", "cuda": "tab:purple",
    "autograd": "tab:pink", "value_and_grad": "navy", "into_buffer": "tab:cyan",
}  # fmt: skip
"""By the first word of a competitor's name, the same in every figure."""


# Figures


def draw_lines(points: Points, path: Path, log: str, ylabel: str, limit: float | None = None) -> None:
    """A line per competitor against MiB per tensor, of points (competitor, x, y).

    Args:
        log: the axes with a logarithmic scale.
        limit: a height to mark.
    """
    lines: dict[str, dict[float, float]] = {}
    for name, x, y in points:
        lines.setdefault(name, {}).setdefault(x, y)
    figure, axes = _axes()
    for name, line in lines.items():
        colour = COLOURS.get(name.split()[0])
        axes.plot(sorted(line), [line[x] for x in sorted(line)], marker=".", label=name, color=colour)
    if limit is not None:
        axes.axhline(limit, color="0.6", linewidth=0.8, linestyle=":")
    for axis in log:
        axes.set(**{f"{axis}scale": "log"})
    if "y" not in log:
        axes.set(ylim=(0, None))
    _save(figure, axes, path, xlabel="MiB per tensor", ylabel=ylabel)


def draw_host(rows: Sequence[Row], path: Path) -> None:
    """A bar per backend and shape, of the parts of a call."""
    figure, axes = _axes(height=0.9 + 0.35 * len(rows))
    names, left = [f"{row['backend']} {name_of(row['shape'])}" for row in rows], [0.0] * len(rows)
    for part in rows[0]["parts_us"]:
        widths = [row["parts_us"][part] for row in rows]
        axes.barh(names, widths, left=left, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    _save(figure, axes, path, xlabel="µs per call")


def _axes(height: float = 3.2) -> tuple[Any, Any]:
    plt.rcParams.update(STYLE)
    return plt.subplots(figsize=(6.4, height))


def _save(figure: Any, axes: Any, path: Path, **labels: str) -> None:
    axes.set(**labels)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def mib(row: Row) -> float:
    """MiB of a float32 tensor."""
    return 4 * math.prod(row["shape"]) / 2**20


def points_of(rows: Iterable[Row], key: str, scale: float = 1.0) -> Points:
    """The points of rows that hold a figure of every competitor."""
    return ((name, mib(row), value * scale) for row in rows for name, value in row[key].items())


# The page


def render(**parts: Any) -> str:
    """The page with its parts."""
    loader = jinja2.FileSystemLoader(HERE / "pages")
    pages = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.globals["missing"] = lambda suite: f"No record yet: `make bench SUITES={suite}` makes it."
    pages.filters["fixed"] = lambda value, digits=1: "" if value is None else f"{value:.{digits}f}"
    pages.filters["us"] = lambda seconds: f"{seconds * 1e6:.1f}"
    pages.filters["shape"] = name_of
    pages.filters["machine"] = machine_line
    texts = pages.get_template("performance.md.j2").render(**parts).strip().split("```")
    texts[::2] = [re.sub(r"\n{3,}", "\n\n", text) for text in texts[::2]]  # between blocks of code
    return "```".join(texts) + "\n"


def machine_line(part: Mapping[str, Any]) -> str:
    """Device, driver of a GPU, versions, commit and date."""
    driver = f"driver {part['driver']}, L2 cache of {part['l2_bytes'] / 2**20:.0f} MiB" if part.get("driver") else ""
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    commit = f"commit {part['commit'][:10]}{' and changes' if part['changed'] else ''}" if part["commit"] else ""
    return "; ".join(filter(None, [part["device"], driver, versions, commit, part["date"]])) + "."


def performance(record: dict[str, Any], gpus: Mapping[str, dict[str, Any]], figures: Path) -> str:
    """docs/performance.md.

    Args:
        record: the CPU's record, by suite; a suite that is missing is named with the command that measures it.
        gpus: records of GPUs by file name.
        figures: the folder for the figures.
    """
    parts = {
        suite: record.get(suite, {})
        for suite in ("losses", "scaling", "host", "memory", "training", "evaluation", "closed_form", "compiled")
    }
    losses, training = parts["losses"], parts["training"]
    groups: dict[str, list[Row]] = {}
    for row in losses.get("rows", []):
        groups.setdefault(f"{row['form']} {row['dtype']}", []).append(row)
    if losses:
        shown = points_of(groups["gaussian float32"], "medians", 1e6)
        draw_lines(shown, figures / "losses.svg", "xy", "µs per call")
    if parts["scaling"]:
        shares = points_of(rows_of(parts["scaling"], "batch"), "share")
        draw_lines(shares, figures / "speed-of-light.svg", "x", "share of the copy bandwidth", 1)
    if parts["host"]:
        draw_host(parts["host"]["rows"], figures / "host.svg")
    return render(
        **parts,
        bounds={suite: list(judged(parts[suite])) for suite, judged in promises.CPU.items() if parts[suite]},
        bandwidths=groups.pop("bandwidth float32", []),
        tables=groups,
        rows_of=rows_of,
        gpus=[gpu_part(Path(name).stem, one, figures) for name, one in gpus.items()],
        waiting=list(promises.gpu({})),
        pipes=pipes,
        devices=DEVICES,
        kept=promises.KEPT,
        jobs=(promises.REFERENCE_JOB, promises.JOB),
        median=functools.partial(median, training),
        job_factor=functools.partial(job_factor, training),
    )


def job_factor(part: dict[str, Any], latents: int) -> float:
    """How many times as fast the whole job is if fdu samples this many latents, from the seconds for one."""
    one = median(part, promises.JOB, "wall_sampling") / part["job_latents"]
    estimate = one * latents / part["job_share"] + median(part, promises.JOB, "wall_training")
    return job_seconds(part, promises.REFERENCE_JOB) / estimate


def pipes(row: Row) -> list[tuple[str, float]]:
    """By device: the share of a multiprocessor's busiest pipe that a hot loop takes at 0.9 of the copy bandwidth."""
    passes = next(count for name, count in PASSES.items() if row["loop"].startswith(name))
    moved = passes * {"float32": 4, "bfloat16": 2}[row["dtype"]]
    busiest = max(row["instructions"] / ISSUED, row["special"] / SPECIAL)  # cycles per element
    return [
        (name, 0.9 * busiest * copied / (moved * multiprocessors * clock))
        for name, (gpu, multiprocessors, clock, copied) in DEVICES.items()
        if gpu == row["gpu"]
    ]


def gpu_part(stem: str, record: dict[str, Any], figures: Path) -> dict[str, Any]:
    """The promises, figures and rows of one GPU record."""
    machine = next(iter(gpu_rows(record, "device", "machine")), None)
    of_share = [
        row for row in gpu_rows(record, "share_of_copy", "sweep", "large")
        if (row["form"], row["dtype"]) == ("gaussian", "float32") and len(row["shape"]) == 4
    ]  # fmt: skip
    if of_share:
        points = ((row["candidate"], mib(row), row["share_of_copy"]) for row in of_share)
        draw_lines(points, figures / f"{stem}-speed-of-light.svg", "x", "share of the copy bandwidth", 1)
    host = gpu_rows(record, "parts_us", "host")
    if host:
        draw_host(host, figures / f"{stem}-host.svg")
    return {
        "stem": stem, "machine": machine, "promises": list(promises.gpu(record)), "shares": of_share, "host": host,
        "losses": gpu_rows(record, "cold_us", "latents", "large", "sweep"),
        "training": gpu_rows(record, "step_s", "sd15", "compiled", "sdxl"),
        "variants": sorted(
            gpu_rows(record, "share", "probe"), key=lambda row: (row["size"], row["dtype"], -row["share"])
        ),
    }  # fmt: skip


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=records.RECORD, help="of the CPU (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="for the page (default: %(default)s)")
    options = parser.parse_args()
    gpus = {path.name: records.read(path) for path in sorted(options.record.parent.glob("gpu*.json"))}
    record = {**records.read(options.record.parent / "compiled.json"), **records.read(options.record)}
    text = performance(record, gpus, options.docs / "performance")
    (options.docs / "performance.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
