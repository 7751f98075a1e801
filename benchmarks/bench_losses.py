"""Value and gradient of the losses on the CPU against eager PyTorch and torch.compile: ``python bench_losses.py``.

Options are pytest's: ``-k "gaussian and float32"`` picks comparisons, ``--record FILE`` keeps the figures,
``--competitors FILE`` enters yours (competitors.py). gpu_suite.py times the losses on a GPU.

``test_losses`` times calls on the same inputs, each after a call that is not timed. ``test_bandwidth`` compares
value_and_grad with torch.clone, a measure of memory speed. Its calls cycle through sets of inputs that together exceed
the caches. Clone moves 2N bytes, value_and_grad 3N.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import timing
import torch
from competitors import DTYPES, FORMS, FUSED, SIGMA, Shape, candidate, check, competitors_of, inputs, rotating

import fdu_kernels as fk

SHAPES = [(2, 4, 64, 64), (16, 4, 64, 64), (64, 4, 64, 64), (16, 16, 128, 128), (64, 16, 128, 128)]
BACKEND = "cpu"
CASES = [*(("gaussian", dtype) for dtype in DTYPES), *((form, "float32") for form in FORMS if form != "gaussian")]
"""Every loss in float32, the recommended one also in half precision."""


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(("form", "dtype"), CASES)
def test_losses(benchmark: timing.BenchmarkFixture, form: str, dtype: str, shape: Shape) -> None:
    """All competitors of a form take turns."""
    a, b = inputs(shape, DTYPES[dtype], BACKEND, wanted=FORMS[form].wanted)
    found = competitors_of(form, [BACKEND])
    runs = {name.removeprefix(f"{BACKEND} "): run for name, run in found.items()}
    if form == "gaussian":
        into = functools.partial(fk.gaussian_divergence_value_and_grad, grad_out=torch.empty_like(a).detach())
        runs["into_buffer"] = lambda a, b: into(a, b, "squared_hellinger", SIGMA, backend=BACKEND)
    for run in runs.values():
        check(run, form, a, b)
    rounds, iterations = max(15, min(150, 60_000_000 // a.numel())), max(1, 200_000 // a.numel())
    turns = itertools.repeat((a, b))
    times = benchmark.pedantic(
        timing.take_turns, (runs, rounds, iterations, turns, lambda call, *given: call(*given)), rounds=1
    )
    medians = timing.medians(times)
    benchmark.extra_info.update(form=form, dtype=dtype, shape=shape, medians=medians)
    timing.show(form, shape, a.dtype, medians)


@pytest.mark.parametrize("shape", SHAPES[-2:], ids=lambda shape: "x".join(map(str, shape)))
def test_bandwidth(benchmark: timing.BenchmarkFixture, shape: Shape) -> None:
    """Squared Hellinger in float32 against torch.clone; both allocate what they return."""
    pairs = rotating("gaussian", shape, torch.float32, BACKEND, 2 * timing.ROTATING)
    rounds = max(41, min(401, 1_600_000_000 // math.prod(shape)))
    runs = {FUSED: candidate("gaussian", FUSED, BACKEND)}
    found = benchmark.pedantic(timing.sweep, ("gaussian", runs, pairs, rounds), rounds=1)
    found["share"] = found["share"][FUSED]
    benchmark.extra_info.update(form="bandwidth", dtype="float32", **found)
    timing.show("gaussian", shape, torch.float32, found["medians"])


if __name__ == "__main__":
    raise SystemExit(timing.run_alone(__file__))
