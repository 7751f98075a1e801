"""What is promised of speed and memory, judged by the records: ``python benchmarks/promises.py FILE...``.

Prints every promise of the records and exits with 1 if one is broken. A promise that a record has no figures for waits;
it neither holds nor fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import operator
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FUSED = "value_and_grad"
FULL, LARGE = 512 << 20, 64 << 20
"""Bytes per tensor."""
SENSES = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
Row = dict[str, Any]

# Form and dtype, which competitor against which baseline, the statistic over shapes, the least ratio.
LOSSES = [
    ("gaussian", "float32", "autograd", "eager", "geometric mean", 4.0),
    ("gaussian", "float32", "autograd", "compiled", "geometric mean", 2.0),
    ("gaussian", "float32", "autograd", "compiled", "least", 1.2),
    ("gaussian", "float32", FUSED, "eager", "geometric mean", 6.0),
    ("gaussian", "bfloat16", "autograd", "eager", "geometric mean", 4.0),
    ("gaussian", "float16", "autograd", "eager", "geometric mean", 4.0),
    ("gaussian", "bfloat16", FUSED, "eager", "geometric mean", 4.0),
    ("gaussian", "float16", FUSED, "eager", "geometric mean", 4.0),
    ("variational", "float32", FUSED, "eager", "geometric mean", 4.0),
    ("density_ratio", "float32", FUSED, "eager", "geometric mean", 4.0),
]
BANDWIDTH = 0.8
"""Of torch.clone's, at the two largest shapes."""
KEPT, JOB, REFERENCE_JOB = "fdu, frozen outputs kept", "fdu job", "reference job"
"""Runs of the training benchmark."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """A promise, and what was measured."""

    what: str
    sense: str
    bound: float
    value: float | None
    """None: the record does not say."""
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "holds", "fails" or "waits"."""
        if self.value is None:
            return "waits"
        return "holds" if SENSES[self.sense](self.value, self.bound) else "fails"

    @property
    def measured(self) -> str:
        """The figure, in three digits."""
        return "" if self.value is None else f"{self.value:.3g}"

    def __str__(self) -> str:
        return (
            f"{self.verdict:>5}  {self.what}: {self.measured or 'no figure'} ({self.sense} {self.bound:g}) {self.note}"
        )


def notes(record: dict[str, Any], *forms: str) -> list[Row]:
    """What the benchmarks of a pytest-benchmark record noted, of some forms or all."""
    found = [entry["extra_info"] for entry in record.get("benchmarks", [])]
    return [note for note in found if not forms or note.get("form") in forms]


def name_of(shape: Iterable[int]) -> str:
    """As "2x4x64x64"."""
    return "x".join(map(str, shape))


def judge(bounds: list[Bound]) -> int:
    """Print the bounds; 1 if one is broken."""
    for bound in bounds:
        print(bound)
    return int(any(bound.verdict == "fails" for bound in bounds))


# CPU


def losses(record: dict[str, Any]) -> Iterator[Bound]:
    """The losses against eager PyTorch, torch.compile and torch.clone (bench_losses.py)."""
    for form, dtype, which, baseline, statistic, least in LOSSES:
        times = [note["medians"] for note in notes(record, form) if note["dtype"] == dtype]
        # A competitor that is missing from a shape breaks the promise: NaN is not >= anything.
        ratios = [one.get(baseline, math.nan) / one.get(which, math.nan) for one in times]
        if ratios:
            value = min(ratios, key=lambda ratio: (not math.isnan(ratio), ratio))
            if statistic != "least" and not math.isnan(value):
                value = statistics.geometric_mean(ratios)
            yield Bound(f"{form} {dtype}, {which}, {statistic}: x {baseline}", ">=", least, value)
    for note in notes(record, "bandwidth"):
        what = f"{name_of(note['shape'])}, {FUSED}: share of clone's bandwidth"
        yield Bound(what, ">=", BANDWIDTH, note["share"])


def median(record: dict[str, Any], name: str, figure: str) -> float:
    """Of one figure of a training run over the rounds."""
    return statistics.median(figures[figure] for figures in record["runs"][name])


def job_seconds(record: dict[str, Any], name: str) -> float:
    """Of the whole training job."""
    return median(record, name, "wall_sampling") + median(record, name, "wall_training")


def training(record: dict[str, Any]) -> Iterator[Bound]:
    """fdu's training against the published loops (bench_training.py)."""
    rate = median(record, "reference", "wall_step") / median(record, KEPT, "wall_step")
    peak = median(record, KEPT, "peak") / median(record, "reference", "peak")
    factor = job_seconds(record, REFERENCE_JOB) / job_seconds(record, JOB)
    yield Bound("step rate: x the reference loop", ">=", 1.6, rate)
    yield Bound("peak memory of the steps, of the reference loop's", "<=", 0.6, peak)
    yield Bound("whole job: x the reference loop", ">=", 4.0, factor)


def evaluation(record: dict[str, Any]) -> Iterator[Bound]:
    """An evaluation on two CPU cores (bench_evaluation.py)."""
    yield Bound("an evaluation, s", "<=", record["bound"], sum(record["seconds"].values()))


# GPU


def gpu(record: dict[str, Any]) -> Iterator[Bound]:
    """Everything of gpu_suite.py."""
    yield from gpu_losses(record)
    yield from gpu_training(record)
    for stage, what in (("tests", "tests/gpu: exit code"), ("sanitizer", "compute-sanitizer: exit code")):
        result = record.get(stage, {})
        ran = "exit" in result and not record.get("rehearsal")
        code = 1 if result.get("exit") is None else result["exit"]  # no code: it ran out of time
        tail = (result.get("tail") or [""])[-1]
        yield Bound(what, "==", 0.0, float(code) if ran else None, tail if ran else result.get("skipped", ""))


def loss_rows(record: dict[str, Any], *sections: str) -> list[Row]:
    """The rows of sections of losses that have figures."""
    return [row for name in sections for row in record.get(name, {}).get("rows", []) if "cold_us" in row]


def training_rows(record: dict[str, Any]) -> list[Row]:
    """The rows of training steps that have figures."""
    sections = ("sd15", "compiled", "sdxl")
    return [row for name in sections for row in record.get(name, {}).get("rows", []) if "step_s" in row]


def size_of(row: Row) -> int:
    """Bytes of one of its tensors."""
    return math.prod(row["shape"]) * (2 if row["dtype"] in ("bfloat16", "float16") else 4)


def ratios(rows: Iterable[Row], baseline: str, figure: str) -> Iterator[tuple[float, Row]]:
    """For every shape and kind, how many times faster than ``baseline`` the fastest of ours is, and its row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get(figure):
            groups.setdefault((tuple(row["shape"]), row["dtype"], row["form"]), []).append(row)
    for group in groups.values():
        base = [row for row in group if row["candidate"] == baseline]
        ours = [row for row in group if FUSED in row["candidate"]]
        if base and ours:
            best = min(ours, key=lambda row: row[figure])
            yield base[0][figure] / best[figure], best


def least(pairs: Iterable[tuple[float, Row]]) -> tuple[float | None, str]:
    """The worst, and where it was."""
    worst = min(pairs, key=lambda pair: pair[0], default=None)
    if worst is None:
        return None, ""
    value, row = worst
    return value, f"{row['form']} {row['dtype']} {name_of(row['shape'])}, {row['candidate']}"


def gpu_losses(record: dict[str, Any]) -> Iterator[Bound]:
    """Bandwidth, latency, large tensors, memory."""
    large = loss_rows(record, "large")
    for form in ("gaussian", "variational"):
        for dtype in ("float32", "bfloat16"):
            mine = [row for row in large if (row["form"], row["dtype"]) == (form, dtype) and size_of(row) == FULL]
            # The best backend at each shape, and the worst shape: long samples count as much as many.
            by_shape: dict[tuple[int, ...], tuple[float, Row]] = {}
            for row in mine:
                share, shape = row.get("share_of_copy", 0.0), tuple(row["shape"])
                if share > by_shape.get(shape, (0.0, row))[0]:
                    by_shape[shape] = share, row
            value, note = least(by_shape.values())
            yield Bound(f"{form} {dtype}, 512 MiB: share of the copy bandwidth", ">=", 0.9, value, note)
    latents = loss_rows(record, "latents")
    for baseline, bound in (("eager", 5.0), ("compiled", 2.0)):
        value, note = least(ratios(latents, baseline, "wall_us"))
        yield Bound(f"latents, with the host's time: x {baseline}", ">=", bound, value, note)
    for baseline, bound in (("eager", 3.0), ("compiled", 1.3)):
        rows = [row for row in large if size_of(row) >= LARGE]
        value, note = least(ratios(rows, baseline, "cold_us"))
        yield Bound(f"64 MiB and above: x {baseline}", ">=", bound, value, note)
    ours = [row for row in large if FUSED in row["candidate"] and "extra_bytes" in row]
    value, note = least((-row["extra_bytes"] / size_of(row), row) for row in ours)
    yield Bound("large: peak beyond inputs and gradient, of a tensor", "<=", 0.01, value and abs(value), note)


def gpu_training(record: dict[str, Any]) -> Iterator[Bound]:
    """The step at the shape of Stable Diffusion 1.5, batch two, bf16: the fastest run among those that need little."""
    wanted = ("sd15", 2, "bf16")
    rows = [row for row in training_rows(record) if (row["model"], row["batch"], row["precision"]) == wanted]
    reference = next((row for row in rows if row["name"] == "reference"), None)
    ours = [row for row in rows if row["loop"] == "fdu"]
    rate = peak = None
    note = ""
    if reference and ours:
        sparing = [row for row in ours if row["peak_mib"] <= 0.6 * reference["peak_mib"]] or ours
        best = min(sparing, key=lambda row: row["step_s"])
        rate, peak = reference["step_s"] / best["step_s"], best["peak_mib"] / reference["peak_mib"]
        note = best["name"]
    yield Bound("step of Stable Diffusion 1.5: x the reference loop", ">=", 3.0, rate, note)
    yield Bound("the same run's peak memory, of the reference loop's", "<=", 0.6, peak, note)


SUITES = {"losses": losses, "training": training, "evaluation": evaluation, "gpu": gpu}
"""By the folder of a record."""


def main() -> int:
    """Judge the records that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, metavar="FILE", help="such as results/losses/cpu.json")
    bounds: list[Bound] = []
    for path in parser.parse_args().records:
        if path.parent.name not in SUITES:
            parser.error(f"{path}: nothing is promised of {path.parent.name!r}, only of {', '.join(SUITES)}")
        bounds += SUITES[path.parent.name](json.loads(path.read_text()))
    return judge(bounds)


if __name__ == "__main__":
    sys.exit(main())
