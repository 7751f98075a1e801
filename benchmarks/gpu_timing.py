"""How the GPU suite measures: device time cold and hot, time with the host, graphs, and what a section is told.

Everything runs on the CPU as well, with the clock on the wall, for the rehearsal.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

L2_BYTES = 128 << 20
"""Inputs that rotate exceed this together; more than any L2 cache of today."""
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


def device_us(run: Run, pairs: Sequence[Pair], rounds: int, device: str) -> list[float]:
    """Microseconds of each call on the device, inputs in turn, after a few that are not timed."""
    for a, b in pairs[:3]:
        run(a, b)
    if device != "cuda":
        turns = itertools.islice(itertools.cycle(pairs), rounds)
        return [span_us(functools.partial(run, *pair)) for pair in turns]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    torch.cuda.synchronize()
    for index, (start, end) in enumerate(events):
        a, b = pairs[index % len(pairs)]
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


def wall_us(run: Run, pairs: Sequence[Pair], calls: int, device: str, repeats: int = 7) -> float:
    """Microseconds a call, of many one after the other until the device is done: the longer of host and device."""

    def many() -> None:
        for index in range(calls):
            run(*pairs[index % len(pairs)])
        wait(device)

    many()
    return statistics.median(span_us(many) for _ in range(repeats)) / calls


def graph_us(run: Run, pair: Pair, device: str) -> float | None:
    """Microseconds of a call inside a replayed CUDA graph; None where there are none, or it cannot be captured."""
    if device != "cuda":
        return None
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run(*pair)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPHED):
                run(*pair)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return statistics.median(device_us(lambda *_: graph.replay(), [pair], 20, device)) / GRAPHED
