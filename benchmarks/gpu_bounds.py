"""What is promised on a GPU, line by line, judged by a record of gpu_suite.py.

A line that a record has no figures for waits; it neither holds nor fails.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator
from typing import Any

FUSED = "value_and_grad"
SECTIONS_OF_LOSSES = ("latents", "large", "sweep")
FULL, LARGE = 512 << 20, 64 << 20
"""Bytes a tensor."""
SENSES = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
Row = dict[str, Any]


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


def loss_rows(record: dict[str, Any], *sections: str) -> list[Row]:
    """The rows of sections of losses that have figures."""
    found = []
    for section in sections or SECTIONS_OF_LOSSES:
        found += [row for row in record.get(section, {}).get("rows", []) if "cold_us" in row]
    return found


def training_rows(record: dict[str, Any]) -> list[Row]:
    """The rows of training steps that have figures."""
    sections = ("sd15", "compiled", "sdxl")
    return [row for name in sections for row in record.get(name, {}).get("rows", []) if "step_s" in row]


def size_of(row: Row) -> int:
    """Bytes of one of its tensors."""
    size = 2 if row["dtype"] in ("bfloat16", "float16") else 4
    for length in row["shape"]:
        size *= length
    return size


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


def least(found: Iterable[tuple[float, Row]]) -> tuple[float | None, str]:
    """The least ratio, and where it is."""
    worst = min(found, key=lambda pair: pair[0], default=None)
    if worst is None:
        return None, ""
    row = worst[1]
    return worst[0], f"{row['form']} {row['dtype']} {'x'.join(map(str, row['shape']))}, {row['candidate']}"


def bounds(record: dict[str, Any]) -> list[Bound]:
    """Every promise."""
    return [*loss_bounds(record), *training_bounds(record), *command_bounds(record)]


def loss_bounds(record: dict[str, Any]) -> Iterator[Bound]:
    """Bandwidth, latency, large tensors, memory."""
    large = loss_rows(record, "large")
    for form in ("gaussian", "variational"):
        for dtype in ("float32", "bfloat16"):
            mine = [row for row in large if (row["form"], row["dtype"]) == (form, dtype) and size_of(row) == FULL]
            shares = [(row["share_of_copy"], row) for row in mine if row.get("share_of_copy")]
            # The best backend at each shape, and the worst shape: long samples count as much as many.
            by_shape: dict[tuple[int, ...], tuple[float, Row]] = {}
            for share, row in shares:
                shape = tuple(row["shape"])
                by_shape[shape] = max(by_shape.get(shape, (0.0, row)), (share, row), key=lambda pair: pair[0])
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
    extras = [
        (row["extra_bytes"] / size_of(row), row) for row in large if FUSED in row["candidate"] and "extra_bytes" in row
    ]
    worst = max(extras, key=lambda pair: pair[0], default=None)
    note = "" if worst is None else f"{worst[1]['form']} {worst[1]['candidate']}"
    yield Bound("large: peak beyond inputs and gradient, of a tensor", "<=", 0.01, worst and worst[0], note)


def training_bounds(record: dict[str, Any]) -> Iterator[Bound]:
    """The step at the shape of Stable Diffusion 1.5, batch two, bf16: the fastest run among those that need little."""
    rows = [
        row for row in training_rows(record) if (row["model"], row["batch"], row["precision"]) == ("sd15", 2, "bf16")
    ]
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


def command_bounds(record: dict[str, Any]) -> Iterator[Bound]:
    """Tests and sanitizer, by their exit codes."""
    for stage, what in (("tests", "tests/gpu: exit code"), ("sanitizer", "compute-sanitizer: exit code")):
        result = record.get(stage, {})
        ran = "exit" in result and not record.get("rehearsal")
        code = result.get("exit")
        value = float(1 if code is None else code) if ran else None  # no code: it ran out of time
        yield Bound(what, "==", 0.0, value, (result.get("tail") or [""])[-1] if ran else result.get("skipped", ""))
