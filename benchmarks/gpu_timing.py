"""How the GPU suite measures: device time cold and hot, time with the host, graphs; what a section is told and keeps.

Everything runs on the CPU as well, with the wall clock, for the rehearsal.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from competitors import Pair
from torch import Tensor

from fdu.storage.output import write_json

CLOCK_HZ = 2e9
"""Of a GPU, roughly."""
LEADS = (3e-4, 2e-3)
"""Seconds by which the host may get ahead of the device, at least and at most."""
Run = Callable[[Tensor, Tensor], object]


@dataclasses.dataclass
class Plan:
    """What a section is told, and the rows that it keeps as they come: one that fails loses no other, and none is begun
    that may take too long."""

    deadline: float
    """By time.monotonic()."""
    write: Callable[[Any], object]
    """Writes the section's result so far."""
    rehearsal: bool = False
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: list[Any] = dataclasses.field(default_factory=list)
    longest: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of the longest row so far, by kind."""

    @property
    def device(self) -> str:
        """Where to measure."""
        return "cpu" if self.rehearsal else "cuda"

    def may_begin(self, least: float, kind: str = "") -> bool:
        """Whether there is time for another row: ``least`` seconds, and a little more than the longest of its kind."""
        wanted = max(0.0 if self.rehearsal else least, 1.2 * self.longest.get(kind, 0.0))
        return self.deadline - time.monotonic() > wanted

    def add(self, row: dict[str, Any], measure: Callable[[], dict[str, Any]], kind: str = "") -> None:
        """Put the figures, or the error, into a row and keep it."""
        began = time.monotonic()
        self.rows.append(row)
        try:
            row.update(measure())
        except Exception as error:  # out of memory, or what does not run on this device
            row["error"] = described(error)
        self.longest[kind] = max(self.longest.get(kind, 0.0), time.monotonic() - began)
        self.keep(False)

    def keep(self, complete: bool = True) -> None:
        """Write what there is."""
        self.write({"complete": complete and not self.left_out, "left_out": self.left_out, "rows": self.rows})


def main(sections: Mapping[str, Callable[[Plan], None]]) -> None:
    """Run the section that the command line names. gpu_suite.py says in the environment until when, and where it keeps
    its rows; ``python benchmarks/gpu_losses.py large`` alone has a minute and prints them."""
    if len(sys.argv) != 2 or sys.argv[1] not in sections:
        sys.exit(f"name one section: {', '.join(sections)}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it looks at its deadline itself
    part, found = os.environ.get("FDU_PART"), {}
    rehearsal = "FDU_REHEARSAL" in os.environ if part else not torch.cuda.is_available()
    if rehearsal:
        torch.set_num_threads(1)  # nothing in it is large enough for two
    keep = functools.partial(write_json, Path(part)) if part else found.update
    sections[sys.argv[1]](Plan(float(os.environ.get("FDU_DEADLINE", time.monotonic() + 60)), keep, rehearsal))
    if found:
        print(json.dumps(found, indent=1))


def described(error: Exception) -> str:
    """In a record."""
    return f"{type(error).__name__}: {error}"[:400]


def wait(device: str) -> None:
    """Until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def l2_bytes(device: str) -> int:
    """Of the device's L2 cache; of a CPU a number for the rehearsal."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 20


def device_us(run: Run, turns: Iterator[Pair], rounds: int, device: str) -> list[float]:
    """Microseconds of each call on the device, on the next inputs each, after three that are not timed.

    The device sleeps before each call, while the host prepares it: else a short kernel would wait for the host between
    the two events, and that would be timed.
    """
    for _ in range(3):
        run(*next(turns))
    wait(device)
    if device != "cuda":
        return [span_us(functools.partial(run, *next(turns))) for _ in range(rounds)]
    lead = min(max(LEADS[0], 2e-6 * span_us(functools.partial(run, *next(turns)))), LEADS[1])
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for start, end in events:
        a, b = next(turns)
        torch.cuda._sleep(int(lead * CLOCK_HZ))
        start.record()
        run(a, b)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def span_us(call: Callable[[], object]) -> float:
    """Microseconds of one call on the wall clock."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def host_us(run: Run, pair: Pair, rounds: int, device: str) -> float:
    """Microseconds until a call returns, onto an idle device."""
    spans = []
    for _ in range(rounds):
        wait(device)
        spans.append(span_us(lambda: run(*pair)))
    return statistics.median(spans)


def wall_us(run: Run, turns: Iterator[Pair], calls: int, device: str, repeats: int = 7) -> float:
    """Microseconds per call, of many in a row until the device is done: the longer of host and device."""

    def many() -> None:
        for _ in range(calls):
            run(*next(turns))
        wait(device)

    many()
    return statistics.median(span_us(many) for _ in range(repeats)) / calls


def graph_us(run: Run, pair: Pair) -> float:
    """Microseconds per call inside a replayed CUDA graph.

    Raises:
        Exception: it cannot be captured; the current stream is the one it was.
    """
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()
    return 1e3 * do_bench_cudagraph(lambda: run(*pair), return_mode="median")
