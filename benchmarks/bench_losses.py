"""Value and gradient of the losses on the CPU, against eager PyTorch and torch.compile: ``pytest bench_losses.py``.

``--benchmark-json=FILE`` keeps the figures; ``python benchmarks/compare.py FILE`` prints the ratios. Every candidate is
checked against eager PyTorch in float64 before it is timed. The candidates of one comparison take turns, so that all of
them see the same state of the machine. On a GPU, gpu_suite.py times them.

``test_gaussian``, ``test_mse`` and ``test_density_ratios`` time calls on the same inputs, after a call that is not
timed. ``test_bandwidth`` compares with the speed of the memory, torch.clone, on inputs that rotate through more than
the caches hold: clone reads one tensor and writes one (2N), value_and_grad reads two and writes one (3N).
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from candidates import CLONE_PASSES, DTYPES, FORMS, SIGMA, Call, Outcome, candidate, check, inputs
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fdu_kernels as fk

SHAPES = [(2, 4, 64, 64), (16, 4, 64, 64), (64, 4, 64, 64), (16, 16, 128, 128), (64, 16, 128, 128)]
BACKEND = "cpu"
ROTATING = 128 << 20
"""Bytes of rotating predictions, more than the caches hold; of targets there are as many."""
PASSES = FORMS["gaussian"].passes / CLONE_PASSES
"""The bytes of value_and_grad by those of clone."""


def take_turns(benchmark: BenchmarkFixture, calls: dict[str, Callable[[], object]], elements: int) -> None:
    """Time calls in rounds, each in turn, and note the median seconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    iterations = max(1, 200_000 // elements)

    def one_round() -> None:
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(iterations):
                call()
            times[name].append((time.perf_counter() - start) / iterations)

    rounds = max(15, min(150, 60_000_000 // elements))
    benchmark.pedantic(one_round, rounds=rounds, iterations=1, warmup_rounds=2)
    for measured in times.values():
        del measured[:2]
    benchmark.extra_info["medians"] = {name: statistics.median(measured) for name, measured in times.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gaussian(benchmark: BenchmarkFixture, dtype: str, shape: tuple[int, ...]) -> None:
    """Squared Hellinger, the recommended loss."""
    pred, target = inputs(shape, DTYPES[dtype], BACKEND)
    target.requires_grad_(False)
    buffer = torch.empty_like(pred).requires_grad_(False)

    def into_buffer(pred: Tensor, target: Tensor) -> Outcome:
        return fk.gaussian_divergence_value_and_grad(
            pred, target, "squared_hellinger", SIGMA, backend=BACKEND, grad_out=buffer
        )

    _compare(benchmark, "gaussian", dtype, pred, target, {"into_buffer": into_buffer})


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_mse(benchmark: BenchmarkFixture, shape: tuple[int, ...]) -> None:
    """The profile h(s) = s, where the baseline is F.mse_loss itself."""
    pred, target = inputs(shape, torch.float32, BACKEND)
    target.requires_grad_(False)
    _compare(benchmark, "mse", "float32", pred, target, {})


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("form", ["variational", "density_ratio"])
def test_density_ratios(benchmark: BenchmarkFixture, form: str, shape: tuple[int, ...]) -> None:
    """The bound and the plug-in estimate."""
    _compare(benchmark, form, "float32", *inputs(shape, torch.float32, BACKEND), {})


@pytest.mark.parametrize("shape", SHAPES[-2:], ids=lambda shape: "x".join(map(str, shape)))
def test_bandwidth(benchmark: BenchmarkFixture, shape: tuple[int, ...]) -> None:
    """Squared Hellinger in float32 against torch.clone, both of which allocate what they return.

    A round times one call of each on the next of several pairs of random tensors; its share is that of bandwidths.
    """
    generator = torch.Generator().manual_seed(0)
    size = 4 * math.prod(shape)
    tensors = [torch.randn(shape, generator=generator) for _ in range(2 * max(2, -(-ROTATING // size)))]
    pairs = itertools.cycle(zip(tensors[::2], tensors[1::2], strict=True))
    times: list[tuple[float, float]] = []

    def seconds(call: Callable[[Tensor, Tensor], object]) -> float:
        pred, target = next(pairs)
        start = time.perf_counter()
        call(pred, target)
        return time.perf_counter() - start

    def value_and_grad(pred: Tensor, target: Tensor) -> Outcome:
        return fk.gaussian_divergence_value_and_grad(pred, target, "squared_hellinger", SIGMA, backend=BACKEND)

    def one_round() -> None:
        times.append((seconds(lambda pred, _: pred.clone()), seconds(value_and_grad)))

    benchmark.extra_info.update(form="bandwidth", dtype="float32", shape=shape)
    benchmark.pedantic(one_round, rounds=max(41, min(401, 1_600_000_000 // math.prod(shape))), warmup_rounds=4)
    clone, ours = (statistics.median(column) for column in zip(*times[4:], strict=True))
    share = statistics.median(PASSES * cloned / computed for cloned, computed in times[4:])
    benchmark.extra_info.update(medians={"clone": clone, "value_and_grad": ours}, share=share, pairs=len(tensors) // 2)


def _compare(
    benchmark: BenchmarkFixture,
    form: str,
    dtype: str,
    a: Tensor,
    b: Tensor,
    others: dict[str, Call],
) -> None:
    runs = {which: candidate(form, which, BACKEND) for which in ("eager", "compiled", "autograd", "value_and_grad")}
    runs.update(others)
    for run in runs.values():
        check(run, form, a, b)
    benchmark.extra_info.update(form=form, dtype=dtype, shape=tuple(a.shape))
    take_turns(benchmark, {which: functools.partial(run, a, b) for which, run in runs.items()}, a.numel())
