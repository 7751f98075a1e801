"""Value and gradient of the losses against eager PyTorch and torch.compile: ``pytest benchmarks/bench_losses.py``.

``--benchmark-json=FILE`` keeps the figures; ``python benchmarks/compare.py FILE`` prints the ratios. Every candidate is
checked against eager PyTorch in float64 before it is timed. The candidates of one comparison take turns, so that all of
them see the same state of the machine.

``test_gaussian`` and ``test_density_ratios`` time calls on the same inputs, after a call that is not timed.
``test_bandwidth`` compares with the speed of the memory, torch.clone, on inputs that rotate through more than the
caches hold: clone reads one tensor and writes one (2N), value_and_grad reads two and writes one (3N).
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
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fdu_kernels as fk

SHAPES = [(2, 4, 64, 64), (16, 4, 64, 64), (64, 4, 64, 64), (16, 16, 128, 128), (64, 16, 128, 128)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIGMA = 0.7
ROTATING = 128 << 20
"""Bytes of rotating predictions, more than the caches hold; of targets there are as many."""
PASSES = 3 / 2
"""The bytes of value_and_grad by those of clone."""
Outcome = tuple[Tensor, ...]


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, where the terms are computed."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def squared_hellinger(pred: Tensor, target: Tensor) -> Tensor:
    """1 - exp(-s/8), as one writes it in PyTorch."""
    s = (widened(pred) - widened(target)).square().flatten(1).mean(1) / SIGMA**2
    return -torch.expm1(s / -8).mean()


def jensen_shannon_bound(p: Tensor, q: Tensor) -> Tensor:
    """E_p[A] - E_q[B] of jensen_shannon: (log 2 - softplus(-v))/2 and (softplus(v) - log 2)/2."""
    return ((math.log(2) - F.softplus(-widened(p))) / 2).mean() - ((F.softplus(widened(q)) - math.log(2)) / 2).mean()


def kl_estimate(v: Tensor, _: Tensor) -> Tensor:
    """E_q[r log r] of the density ratio r = e^v."""
    v = widened(v)
    return (v.exp() * v).mean()


def by_autograd(loss: Callable[[Tensor, Tensor], Tensor], wanted: int) -> Callable[[Tensor, Tensor], Outcome]:
    """Value and gradients in the first ``wanted`` arguments, through autograd."""

    def run(a: Tensor, b: Tensor) -> Outcome:
        leaves = (a, b)[:wanted]
        value = loss(a, b)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int, Callable[..., Tensor], Callable[..., Outcome]]] = {
    "gaussian": (
        squared_hellinger,
        1,
        lambda a, b, backend: fk.gaussian_divergence(a, b, "squared_hellinger", SIGMA, backend=backend),
        lambda a, b, backend: fk.gaussian_divergence_value_and_grad(a, b, "squared_hellinger", SIGMA, backend=backend),
    ),
    "variational": (
        jensen_shannon_bound,
        2,
        lambda a, b, backend: fk.variational_divergence(a, b, "jensen_shannon", backend=backend),
        lambda a, b, backend: fk.variational_divergence_value_and_grad(a, b, "jensen_shannon", backend=backend),
    ),
    "density_ratio": (
        kl_estimate,
        1,
        lambda a, b, backend: fk.density_ratio_divergence(a, "kl", backend=backend),
        lambda a, b, backend: fk.density_ratio_divergence_value_and_grad(a, "kl", backend=backend),
    ),
}
"""Name -> the eager loss, in how many arguments it is differentiated, our loss, our value and gradients."""


def candidate(form: str, which: str, backend: str) -> Callable[[Tensor, Tensor], Outcome]:
    """What is timed: "eager", "compiled", "autograd" (ours) or "value_and_grad" (ours)."""
    eager, wanted, loss, value_and_grad = FORMS[form]
    if which == "eager":
        return by_autograd(eager, wanted)
    if which == "compiled":
        torch._dynamo.reset()
        return by_autograd(torch.compile(eager, fullgraph=True, dynamic=False), wanted)
    if which == "autograd":
        return by_autograd(lambda a, b: loss(a, b, backend), wanted)
    return lambda a, b: value_and_grad(a, b, backend)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Two random tensors, requiring a gradient; small enough for e^v."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(2))
    return a, b


def check(run: Callable[[Tensor, Tensor], Outcome], form: str, a: Tensor, b: Tensor) -> None:
    """Compare with eager PyTorch in float64."""
    eager, wanted, _, _ = FORMS[form]
    wide = [tensor.detach().double().requires_grad_() for tensor in (a, b)]
    expected = by_autograd(eager, wanted)(*wide)
    tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
    for found, true in zip(run(a, b), expected, strict=True):
        spacing = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps  # of subnormal numbers
        atol = max(tolerance * true.abs().max().item(), spacing)
        torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=atol)


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
    pred, target = inputs(shape, DTYPES[dtype], _device())
    target.requires_grad_(False)
    buffer = torch.empty_like(pred).requires_grad_(False)

    def into_buffer(pred: Tensor, target: Tensor) -> Outcome:
        return fk.gaussian_divergence_value_and_grad(
            pred, target, "squared_hellinger", SIGMA, backend=_backend(), grad_out=buffer
        )

    _compare(benchmark, "gaussian", dtype, pred, target, {"into_buffer": into_buffer})


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("form", ["variational", "density_ratio"])
def test_density_ratios(benchmark: BenchmarkFixture, form: str, shape: tuple[int, ...]) -> None:
    """The bound and the plug-in estimate."""
    _compare(benchmark, form, "float32", *inputs(shape, torch.float32, _device()), {})


@pytest.mark.parametrize("shape", SHAPES[-2:], ids=lambda shape: "x".join(map(str, shape)))
def test_bandwidth(benchmark: BenchmarkFixture, shape: tuple[int, ...]) -> None:
    """Squared Hellinger in float32 against torch.clone, both of which allocate what they return.

    A round times one call of each on the next of several pairs of random tensors; its share is that of bandwidths.
    """
    generator = torch.Generator().manual_seed(0)
    size = 4 * math.prod(shape)
    tensors = [torch.randn(shape, generator=generator).to(_device()) for _ in range(2 * max(2, -(-ROTATING // size)))]
    pairs = itertools.cycle(zip(tensors[::2], tensors[1::2], strict=True))
    times: list[tuple[float, float]] = []

    def seconds(call: Callable[[Tensor, Tensor], object]) -> float:
        pred, target = next(pairs)
        start = time.perf_counter()
        call(pred, target)
        return time.perf_counter() - start

    def value_and_grad(pred: Tensor, target: Tensor) -> Outcome:
        return fk.gaussian_divergence_value_and_grad(pred, target, "squared_hellinger", SIGMA, backend=_backend())

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
    others: dict[str, Callable[[Tensor, Tensor], Outcome]],
) -> None:
    runs = {which: candidate(form, which, _backend()) for which in ("eager", "compiled", "autograd", "value_and_grad")}
    runs.update(others)
    for run in runs.values():
        check(run, form, a, b)
    benchmark.extra_info.update(form=form, dtype=dtype, shape=tuple(a.shape))
    take_turns(benchmark, {which: functools.partial(run, a, b) for which, run in runs.items()}, a.numel())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _backend() -> str:
    return "triton" if torch.cuda.is_available() else "cpu"
