"""The promises about speed and memory, judged by records: ``python benchmarks/promises.py [RECORD...]``.

Prints every promise and exits with 1 if one is broken. A promise waits where the record has no figure for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import operator
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import records
from competitors import COMPILED, DTYPES, EAGER, FUSED
from records import Row

from fdu_kernels.registry import PREFERRED_WHEN_BUILT

FULL, LARGE = 512 << 20, 64 << 20
"""Bytes per tensor."""
SENSES = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
MEAN, LEAST = "geometric mean", "least"

# Form and dtype, which competitor against which baseline, the statistic over shapes, the least ratio.
LOSSES = [
    ("gaussian", "float32", "autograd", EAGER, MEAN, 4.0),
    ("gaussian", "float32", "autograd", COMPILED, MEAN, 2.0),
    ("gaussian", "float32", "autograd", COMPILED, LEAST, 1.2),
    ("gaussian", "float32", FUSED, EAGER, MEAN, 6.0),
    ("gaussian", "bfloat16", "autograd", EAGER, MEAN, 4.0),
    ("gaussian", "float16", "autograd", EAGER, MEAN, 4.0),
    ("gaussian", "bfloat16", FUSED, EAGER, MEAN, 4.0),
    ("gaussian", "float16", FUSED, EAGER, MEAN, 4.0),
    ("variational", "float32", FUSED, EAGER, MEAN, 4.0),
    ("density_ratio", "float32", FUSED, EAGER, MEAN, 4.0),
]
KEPT, JOB, REFERENCE_JOB = "fdu, frozen outputs kept", "fdu job", "reference job"
"""Runs of the training benchmark."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """A promise, and what was measured."""

    what: str
    sense: str
    bound: float
    value: float | None
    """None if the record has no figure."""
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
        figure = self.measured or "no figure"
        return f"{self.verdict:>5}  {self.what}: {figure} ({self.sense} {self.bound:g}) {self.note}"


def judge(bounds: Iterable[Bound]) -> int:
    """Print the bounds; 1 if one is broken."""
    verdicts = []
    for bound in bounds:
        print(bound)
        verdicts.append(bound.verdict)
    return int("fails" in verdicts)


def name_of(shape: Iterable[int]) -> str:
    """As "2x4x64x64"."""
    return "x".join(map(str, shape))


# CPU


def rows_of(part: dict[str, Any], form: str) -> list[Row]:
    """The rows of a form in a part of a record."""
    return [row for row in part.get("rows", []) if row["form"] == form]


def losses(part: dict[str, Any]) -> Iterator[Bound]:
    """The losses against eager PyTorch, torch.compile and torch.clone (bench_losses.py)."""
    for form, dtype, which, baseline, statistic, least_ratio in LOSSES:
        times = [row["medians"] for row in rows_of(part, form) if row["dtype"] == dtype]
        # A competitor that is missing from a shape breaks the promise.
        ratios = [one[baseline] / one[which] if {baseline, which} <= set(one) else 0.0 for one in times]
        if ratios:
            value = statistics.geometric_mean(ratios) if statistic == MEAN and all(ratios) else min(ratios)
            yield Bound(f"{form} {dtype}, {which}: {statistic} speed-up over {baseline}", ">=", least_ratio, value)
    for row in rows_of(part, "bandwidth"):
        what = f"{name_of(row['shape'])}, {FUSED}: share of the bandwidth of torch.clone"
        yield Bound(what, ">=", 0.8, row["share"])


def median(part: dict[str, Any], name: str, figure: str) -> float:
    """The median of a training run's figure over the rounds."""
    return statistics.median(figures[figure] for figures in part["runs"][name])


def job_seconds(part: dict[str, Any], name: str) -> float:
    """Seconds of the whole training job."""
    return median(part, name, "wall_sampling") + median(part, name, "wall_training")


def training(part: dict[str, Any]) -> Iterator[Bound]:
    """fdu's training against the published loops (bench_training.py)."""
    rate = median(part, "reference", "wall_step") / median(part, KEPT, "wall_step")
    peak = median(part, KEPT, "peak") / median(part, "reference", "peak")
    factor = job_seconds(part, REFERENCE_JOB) / job_seconds(part, JOB)
    yield Bound("step: speed-up over the reference loop", ">=", 1.6, rate)
    yield Bound("peak memory of the steps: share of the reference loop's", "<=", 0.6, peak)
    yield Bound("whole job: speed-up over the reference loop", ">=", 4.0, factor)


def evaluation(part: dict[str, Any]) -> Iterator[Bound]:
    """An evaluation on two CPU cores (bench_evaluation.py)."""
    yield Bound("an evaluation: seconds", "<=", 120.0, sum(part["seconds"].values()))


def closed_form(part: dict[str, Any]) -> Iterator[Bound]:
    """Erasures without training on two CPU cores (bench_closed_form.py)."""
    for what, seconds in part["seconds"].items():
        yield Bound(f"{what}: seconds", "<=", 60.0 if "Diffusion" in what else 1.0, seconds)


CHECKED = {
    "cuda": "tests of cuda", "triton": "tests of triton", "fdu": "tests of trainings",
    "memcheck": "compute-sanitizer, memcheck", "racecheck": "compute-sanitizer, racecheck",
}  # fmt: skip
"""Sections of the GPU suite whose exit code counts."""
CPU = {"losses": losses, "training": training, "evaluation": evaluation, "closed_form": closed_form}
"""The promises about each suite."""


# GPU


def gpu(record: dict[str, Any]) -> Iterator[Bound]:
    """Everything that gpu_suite.py measures."""
    yield from gpu_losses(record)
    yield from gpu_training(record)
    for section, what in CHECKED.items():
        result = record.get(section, {})
        note = result.get("skipped") or (result.get("tail") or [""])[-1]
        yield Bound(f"{what}: exit code", "==", 0.0, result.get("exit"), note)


def gpu_rows(record: dict[str, Any], figure: str, *sections: str) -> list[Row]:
    """The rows of sections that have this figure."""
    return [row for name in sections for row in record.get(name, {}).get("rows", []) if row.get(figure) is not None]


def size_of(row: Row) -> int:
    """Bytes of one of its tensors."""
    return math.prod(row["shape"]) * DTYPES[row["dtype"]].itemsize


def ours_in(rows: Iterable[Row]) -> list[Row]:
    """The rows of our fused kernels."""
    return [row for row in rows if FUSED in row["candidate"]]


def speed_ups(rows: Iterable[Row], baseline: str, figure: str) -> Iterator[tuple[float, Row]]:
    """For every shape, dtype and form, how many times as fast as the baseline our fastest is, and its row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((tuple(row["shape"]), row["dtype"], row["form"]), []).append(row)
    for group in groups.values():
        base = [row for row in group if row["candidate"] == baseline]
        if base and ours_in(group):
            best = min(ours_in(group), key=lambda row: row[figure])
            yield base[0][figure] / best[figure], best


def extreme(choose: Any, pairs: Iterable[tuple[float, Row]]) -> tuple[float | None, str]:
    """The value that ``choose``, min or max, takes, and where it was measured."""
    value, row = choose(pairs, key=lambda pair: pair[0], default=(None, None))
    return value, f"{row['form']} {row['dtype']} {name_of(row['shape'])}, {row['candidate']}" if row else ""


def gpu_losses(record: dict[str, Any]) -> Iterator[Bound]:
    """Bandwidth, latency, large tensors, memory."""
    large = gpu_rows(record, "cold_us", "large")
    fastest = [row for _, row in speed_ups(large, "clone", "cold_us") if size_of(row) == FULL]
    for form, dtype in itertools.product(("gaussian", "variational"), ("float32", "bfloat16")):
        # The worst shape counts, with its best backend.
        best = [(row["share_of_copy"], row) for row in fastest if (row["form"], row["dtype"]) == (form, dtype)]
        yield Bound(f"{form} {dtype}, 512 MiB: share of the copy bandwidth", ">=", 0.9, *extreme(min, best))
    latents = gpu_rows(record, "wall_us", "latents")
    for baseline, bound in ((EAGER, 5.0), (COMPILED, 2.0)):
        found = extreme(min, speed_ups(latents, baseline, "wall_us"))
        yield Bound(f"latents, with the host's time: speed-up over {baseline}", ">=", bound, *found)
    # The slower backend must not be the preferred one.
    names = {f"{PREFERRED_WHEN_BUILT} {FUSED}": FUSED, f"triton {FUSED}": "triton"}
    both = [{**row, "candidate": names[row["candidate"]]} for row in latents if row["candidate"] in names]
    found = extreme(min, speed_ups(both, "triton", "wall_us"))
    yield Bound(f"latents, with the host's time: speed-up of {PREFERRED_WHEN_BUILT} over triton", ">=", 1.0, *found)
    for baseline, bound in ((EAGER, 3.0), (COMPILED, 1.3)):
        found = extreme(min, speed_ups([row for row in large if size_of(row) >= LARGE], baseline, "cold_us"))
        yield Bound(f"64 MiB and larger: speed-up over {baseline}", ">=", bound, *found)
    extra = [(row["extra_bytes"] / size_of(row), row) for row in ours_in(large) if "extra_bytes" in row]
    what = "64 MiB and larger: peak memory beyond inputs and gradients, as a fraction of one input tensor's size"
    yield Bound(what, "<=", 0.01, *extreme(max, extra))


def gpu_training(record: dict[str, Any]) -> Iterator[Bound]:
    """The step at the shape of Stable Diffusion 1.5, batch two, bf16: the fastest run among those that need little."""
    rows = [
        row for row in gpu_rows(record, "step_s", "sd15", "compiled") if (row["batch"], row["precision"]) == (2, "bf16")
    ]
    reference = next((row for row in rows if row["name"] == "reference"), None)
    ours = [row for row in rows if row["name"].startswith("fdu")]
    rate = peak = None
    note = ""
    if reference and ours:
        sparing = [row for row in ours if row["peak_mib"] <= 0.6 * reference["peak_mib"]] or ours
        best = min(sparing, key=lambda row: row["step_s"])
        rate, peak = reference["step_s"] / best["step_s"], best["peak_mib"] / reference["peak_mib"]
        note = best["name"]
    yield Bound("step of Stable Diffusion 1.5: speed-up over the reference loop", ">=", 3.0, rate, note)
    yield Bound("the same run: peak memory, share of the reference loop's", "<=", 0.6, peak, note)


def bounds_of(record: dict[str, Any]) -> Iterator[Bound]:
    """All promises about what a record holds."""
    for suite, promised in CPU.items():
        if suite in record:
            yield from promised(record[suite])
    if any("exit" in part for part in record.values() if isinstance(part, dict)):  # of gpu_suite.py
        yield from gpu(record)


def main() -> int:
    """Judge the records that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=Path, metavar="RECORD", help=f"default: {records.RECORD}")
    paths = parser.parse_args().records or [records.RECORD]
    return judge(bound for path in paths for bound in bounds_of(json.loads(path.read_text())))


if __name__ == "__main__":
    sys.exit(main())
