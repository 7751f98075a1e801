"""How the GPU suite measures: device time cold and hot, time with the host, graphs, and what a section is told.

Everything runs on the CPU as well, with the clock on the wall, for the rehearsal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CACHES = 4
"""Inputs that rotate are together as large as so many L2 caches."""
CLOCK_HZ = 2e9
"""Of a GPU, roughly."""
LEADS = (3e-4, 2e-3)
"""Seconds by which the host may get ahead of the device, at least and at most."""
GRAPHED = 20
"""Calls in a captured graph."""
Pair = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Tensor], object]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a section is told: until when it may run, where it keeps results, and whether it is only rehearsed."""

    deadline: float
    """By time.monotonic()."""
    keep: Callable[[Any], None]
    """Writes the section's result so far."""
    rehearsal: bool = False

    @property
    def device(self) -> str:
        """Where to measure."""
        return "cpu" if self.rehearsal else "cuda"

    @property
    def compiler(self) -> str:
        """torch.compile's backend; in a rehearsal one that compiles nothing."""
        return "eager" if self.rehearsal else "inductor"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()


def wait(device: str) -> None:
    """Until the device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def l2_bytes(device: str) -> int:
    """Of the device's L2 cache; of a CPU a number that rehearses one."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 20


def device_us(run: Run, turns: Iterator[Pair], rounds: int, device: str) -> list[float]:
    """Microseconds of each call on the device, on the next inputs each, after a few that are not timed.

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
    """Microseconds of one call on the wall."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e6


def host_us(run: Run, pair: Pair, rounds: int, device: str) -> float:
    """Microseconds until a call returns, onto a device that is idle."""
    spans = []
    for _ in range(rounds):
        wait(device)
        spans.append(span_us(lambda: run(*pair)))
    return statistics.median(spans)


def wall_us(run: Run, turns: Iterator[Pair], calls: int, device: str, repeats: int = 7) -> float:
    """Microseconds a call, of many one after the other until the device is done: the longer of host and device."""

    def many() -> None:
        for _ in range(calls):
            run(*next(turns))
        wait(device)

    many()
    return statistics.median(span_us(many) for _ in range(repeats)) / calls


def graph_us(run: Run, pair: Pair) -> float:
    """Microseconds of a call inside a replayed CUDA graph.

    Raises:
        Exception: it cannot be captured; the current stream is the one it was.
    """
    before = torch.cuda.current_stream()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(before)
        with torch.cuda.stream(side):
            for _ in range(3):
                run(*pair)
        before.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPHED):
                run(*pair)
    except Exception:
        torch.cuda.set_stream(before)  # a capture that fails at its end leaves its own
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        raise
    return statistics.median(device_us(lambda *_: graph.replay(), itertools.repeat(pair), 20, "cuda")) / GRAPHED
