"""Write docs/performance.md, docs/training.md and their figures from the records: ``python benchmarks/report.py``.

Nothing is measured. The records lie in benchmarks/results, a folder per suite and a file per machine: losses/, host/,
memory/ and scaling/ as pytest-benchmark writes them (``make bench``), training/ and evaluation/ of their scripts, gpu/
of gpu_suite.py. The words are in pages/. A part whose record is missing says which command makes it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jinja2
import plots
import promises
from promises import Row, job_seconds, median, name_of, notes

HERE = Path(__file__).parent
SUITES = ("losses", "host", "memory", "scaling", "training", "evaluation")
MIB = 2**20
Points = Iterable[tuple[str, float, float]]


class Records:
    """The records of one machine by suite, {} where there is none, and those of GPUs by file."""

    def __init__(self, folder: Path, machine: str) -> None:
        self.machine = machine
        paths = {suite: folder / suite / f"{machine}.json" for suite in SUITES}
        found = {suite: json.loads(path.read_text()) if path.is_file() else {} for suite, path in paths.items()}
        self.losses, self.host, self.memory, self.scaling, self.training, self.evaluation = found.values()
        self.gpus = {path.name: json.loads(path.read_text()) for path in sorted((folder / "gpu").glob("*.json"))}


def render(name: str, **parts: Any) -> str:
    """A page of pages/ with its parts."""
    loader = jinja2.FileSystemLoader(HERE / "pages")
    pages = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.globals["missing"] = lambda suite: f"No record yet: `make bench SUITES={suite}` makes it."
    pages.globals["picture"] = lambda alternative, stem: f"![{alternative}](performance/{stem}.svg)"
    pages.filters["fixed"] = lambda value, digits=1: "" if value is None else f"{value:.{digits}f}"
    pages.filters["us"] = lambda seconds: f"{seconds * 1e6:.1f}"
    pages.filters["shape"] = name_of
    pages.filters["listed"] = listed
    texts = pages.get_template(f"{name}.md.j2").render(**parts).strip().split("```")
    texts[::2] = [re.sub(r"\n{3,}", "\n\n", text) for text in texts[::2]]  # between blocks of code
    return "```".join(texts) + "\n"


def performance(records: Records, figures: Path) -> str:
    """docs/performance.md; its figures go into a folder."""
    return render(
        "performance",
        gpus=[gpu_part(Path(name).stem, record, figures) for name, record in records.gpus.items()],
        waiting=list(promises.gpu({})),
        losses=records.losses and losses_part(records.losses, figures),
        sizes=records.scaling and sizes_part(records.scaling, figures),
        host=records.host and host_part(records.host, figures),
        memory=records.memory and memory_part(records.memory, figures),
        concepts=notes(records.scaling, "concepts"),
        evaluation=records.evaluation,
        evaluated=records.evaluation and next(promises.evaluation(records.evaluation)),
    )


def machine_line(record: dict[str, Any]) -> str:
    """Device, versions and commit of a record."""
    info, commit = record["machine_info"], record["commit_info"]
    cpu = f"{info['cpu']['brand_raw']}, {info['cpu']['count']} cores, {info['threads']} threads, {info['capability']}"
    changed = " and changes" if commit["dirty"] else ""
    parts = [f"{info['device']} ({cpu})", listed(info["versions"]), f"commit {commit['id'][:10]}{changed}"]
    return "; ".join([*parts, record["datetime"][:10]]) + "."


def listed(versions: dict[str, Any]) -> str:
    """Names and versions."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def lines_of(points: Points, least: int = 1) -> dict[str, plots.Line]:
    """Name -> sorted (x, y), of points (name, x, y); a line needs so many points at least."""
    lines: dict[str, dict[float, float]] = {}
    for name, x, y in points:
        lines.setdefault(name, {}).setdefault(x, y)
    return {name: sorted(line.items()) for name, line in lines.items() if len(line) >= least}


def points_of(found: list[Row], key: str, x: Callable[[Row], float], scale: Callable[[Row], float]) -> Points:
    """The points of CPU notes: every competitor's figure under ``key``, times a scale."""
    return ((name, x(note), value * scale(note)) for note in found for name, value in note[key].items())


def mib(note: Row) -> float:
    """Of a float32 tensor."""
    return 4 * math.prod(note["shape"]) / MIB


def draw_sizes(shares: dict[str, plots.Line], times: dict[str, plots.Line], figures: Path, prefix: str = "") -> None:
    """Share of the copy bandwidth, and microseconds, against the MiB of a tensor."""
    label = "share of the copy bandwidth"
    plots.lines(shares, figures / f"{prefix}speed-of-light.svg", "x", 1, xlabel="MiB per tensor", ylabel=label)
    plots.lines(times, figures / f"{prefix}latency.svg", xlabel="MiB per tensor", ylabel="µs per call")


# GPU


def gpu_part(stem: str, record: dict[str, Any], figures: Path) -> dict[str, Any]:
    """One record of gpu_suite.py: promises, plots, latents, training."""
    info = record.get("machine", {})
    versions = listed({key: info[key] for key in ("python", "torch", "cuda", "triton", "diffusers") if info.get(key)})
    commit = (str(info.get("commit") or "")[:10] or "unknown") + (" and changes" if info.get("changed") else "")
    line = f"{info.get('driver', '')}; {versions}; commit {commit}; {info.get('date', '')}; record `{stem}.json`."
    rows = [
        row for row in promises.loss_rows(record, "sweep", "large")
        if (row["form"], row["dtype"]) == ("gaussian", "float32") and len(row["shape"]) == 4
    ]  # fmt: skip
    shares, times = (
        lines_of(((row["candidate"], mib(row), row[figure]) for row in rows if row.get(figure)), least=2)
        for figure in ("share_of_copy", "cold_us")
    )
    if shares:
        draw_sizes(shares, times, figures, f"{stem}-")
    host = [row for row in record.get("host", {}).get("rows", []) if "parts_us" in row]
    if host:
        draw_host(host, figures / f"{stem}-host.svg")
    training = promises.training_rows(record)
    half = [row for row in training if row["precision"] == "bf16"]
    batches = lines_of(((f"{row['model']}, {row['name']}", row["batch"], row["images_per_s"]) for row in half), least=2)
    if batches:
        plots.lines(batches, figures / f"{stem}-training.svg", "", xlabel="batch", ylabel="images per second")
    return {
        "stem": stem, "device": info.get("device", "GPU"), "line": line, "promises": list(promises.gpu(record)),
        "shares": shares, "host": host, "batches": batches, "training": training,
        "latents": promises.loss_rows(record, "latents"),
    }  # fmt: skip


# CPU


def losses_part(record: dict[str, Any], figures: Path) -> dict[str, Any]:
    """Promises, bandwidth and all times of the losses."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for note in notes(record):
        groups.setdefault((note["form"], note["dtype"]), []).append(note)
    bandwidths = groups.pop(("bandwidth", "float32"), [])
    shown = lines_of(points_of(groups["gaussian", "float32"], "medians", mib, lambda _: 1e6))
    plots.lines(shown, figures / "losses.svg", xlabel="MiB per tensor", ylabel="µs per call")
    return {
        "machine": machine_line(record),
        "promises": list(promises.losses(record)),
        "keeps_freed_memory": record["machine_info"]["keeps_freed_memory"],
        "bandwidths": bandwidths,
        "tables": [(" ".join(group), found) for group, found in groups.items()],
    }


def sizes_part(record: dict[str, Any], figures: Path) -> dict[str, Any]:
    """Speed of light, latency, and the cost of an element by the size of samples."""
    batches, elements = notes(record, "batch"), notes(record, "elements")
    shares = lines_of(points_of(batches, "share", mib, lambda _: 1))
    draw_sizes(shares, lines_of(points_of(batches, "medians", mib, lambda _: 1e6)), figures)
    nano = lines_of(points_of(elements, "medians", lambda note: note["shape"][1], lambda note: 4e9 / note["bytes"]))
    plots.lines(nano, figures / "elements.svg", xlabel="elements per sample", ylabel="ns per element")
    return {
        "machine": machine_line(record),
        "tables": {"batch of 4x64x64": batches, "elements per sample": elements},
    }


def draw_host(rows: list[Row], path: Path) -> None:
    """A bar per backend and shape."""
    parts = {f"{row['backend']} {name_of(row['shape'])}": row["parts_us"] for row in rows}
    plots.stacked(parts, path, xlabel="µs per call")


def host_part(record: dict[str, Any], figures: Path) -> dict[str, Any]:
    """Microseconds of a call by part, and before and after the last change."""
    found = notes(record, "host")
    draw_host(found, figures / "host.svg")
    return {"machine": machine_line(record), "pieces": found, "changes": notes(record, "host change")}


def memory_part(record: dict[str, Any], figures: Path) -> dict[str, Any]:
    """Peak memory by form and competitor."""
    found = notes(record)
    shares = [{name: one["extra_bytes"] / one["input_bytes"] for name, one in note["memory"].items()} for note in found]
    both = list(zip(found, shares, strict=True))
    largest = [pair for pair in both if pair[0]["shape"] == found[-1]["shape"] and pair[0]["dtype"] == "float32"]
    bars = {f"{note['form']}\n{note['dtype']}": share for note, share in largest}
    plots.grouped(bars, figures / "memory.svg", ylabel="peak beyond inputs and\ngradients, in input tensors")
    return {"machine": machine_line(record), "rows": both}


# Training


def training(record: dict[str, Any], machine: str) -> str:
    """docs/training.md."""
    return render(
        "training",
        record=record,
        machine=machine,
        bounds=list(promises.training(record)),
        kept=promises.KEPT,
        jobs=(promises.REFERENCE_JOB, promises.JOB),
        median=functools.partial(median, record),
        job_factor=functools.partial(job_factor, record),
    )


def job_factor(record: dict[str, Any], latents: int) -> float:
    """How many times faster the whole job is if fdu samples so many latents, from the seconds for one."""
    one = median(record, promises.JOB, "wall_sampling") / record["job_latents"]
    estimate = one * latents / record["job_share"] + median(record, promises.JOB, "wall_training")
    return job_seconds(record, promises.REFERENCE_JOB) / estimate


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the records (default: %(default)s)")
    parser.add_argument("--machine", default="cpu", help="the records' file name (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="the pages (default: %(default)s)")
    options = parser.parse_args()
    records = Records(options.results, options.machine)
    (options.docs / "performance.md").write_text(performance(records, options.docs / "performance"), encoding="utf-8")
    if records.training:
        (options.docs / "training.md").write_text(training(records.training, records.machine), encoding="utf-8")


if __name__ == "__main__":
    main()
