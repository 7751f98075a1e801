"""How the benchmarks of the CPU measure, and what they print. Competitors take turns, so all of them see the same state
of the machine."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import records
import torch
from competitors import CLONE_PASSES, FORMS, Call, Pair, check

if TYPE_CHECKING:  # a GPU machine may not have it
    from pytest_benchmark.fixture import BenchmarkFixture as BenchmarkFixture

ROTATING = 128 << 20
"""Bytes of rotating inputs: more than the caches hold."""


def take_turns(
    calls: Mapping[str, Callable[..., object]],
    rounds: int,
    iterations: int = 1,
    turns: Iterator[tuple[Any, ...]] | None = None,
    before: Callable[..., object] = lambda call, *given: None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round, without the first two rounds.

    Args:
        iterations: calls per turn, of which the mean counts.
        turns: arguments; every turn takes the next ones.
        before: called at each turn with the call and its arguments, not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    turns = turns or itertools.repeat(())
    for number in range(rounds + 2):
        for name, call in calls.items():
            given = next(turns)
            before(call, *given)
            start = time.perf_counter()
            for _ in range(iterations):
                call(*given)
            taken = (time.perf_counter() - start) / iterations
            if number >= 2:
                times[name].append(taken)
    return times


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median time by competitor."""
    return {name: statistics.median(taken) for name, taken in times.items()}


def sweep(form: str, runs: Mapping[str, Call], pairs: Sequence[Pair], rounds: int) -> dict[str, Any]:
    """One call per round on the next pair: medians and quartiles of seconds, and each competitor's share of
    torch.clone's bandwidth in the same round, by the byte model."""
    for run in runs.values():
        check(run, form, *pairs[0])
    calls: dict[str, Callable[..., object]] = {"clone": lambda a, _: a.detach().clone(), **runs}
    times = take_turns(calls, rounds, turns=itertools.cycle(pairs))
    passes = FORMS[form].passes / CLONE_PASSES
    shares = {
        name: statistics.median(passes * cloned / taken for cloned, taken in zip(times["clone"], mine, strict=True))
        for name, mine in times.items()
        if name != "clone"
    }
    return {
        "shape": list(pairs[0][0].shape),
        "bytes": pairs[0][0].nbytes,
        "pairs": len(pairs),
        "medians": medians(times),
        "quartiles": {name: statistics.quantiles(mine, n=4)[::2] for name, mine in times.items()},
        "share": shares,
    }


def show(form: str, shape: Sequence[int], dtype: torch.dtype, seconds: Mapping[str, float]) -> None:
    """Print one comparison: a line per competitor with its time, its bandwidth by the byte model, and the ratio."""
    passes, size = FORMS[form].passes, math.prod(shape) * dtype.itemsize
    print(f"\n{form} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}: {passes} passes over"
          f" {size / 2**20:.3g} MiB move {passes * size / 2**20:.3g} MiB")  # fmt: skip
    for name, taken in seconds.items():
        moved = (CLONE_PASSES if name == "clone" else passes) * size
        ratio = f"{seconds['eager'] / taken:8.2f} times as fast as eager" if "eager" in seconds else ""
        print(f"  {name:<20}{taken * 1e6:12.1f} us{moved / taken / 1e9:10.1f} GB/s{ratio}")


def run_alone(file: str) -> int:
    """``python benchmarks/bench_NAME.py [options of pytest]``: print the device, then each comparison as it ends."""
    found = records.machine()
    print(f"{found['device']}; torch {found['versions']['torch']}", flush=True)
    return pytest.main([file, "-q", "-s", "--benchmark-quiet", "--disable-warnings", *sys.argv[1:]])
