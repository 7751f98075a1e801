"""How the cost grows: with the batch, with the elements of a sample, with the concepts erased at once.

``pytest benchmarks/bench_scaling.py``, on the CPU; on a GPU gpu_suite.py sweeps the same sizes. The sweeps time
value_and_grad of every backend beside eager PyTorch, torch.compile and torch.clone in turn, each round on the next of
several random inputs, which together exceed the caches where the tensors allow it. "share" is the share of clone's
bandwidth in the same round, by the byte model (3N bytes for value and gradient whatever a candidate really moves, 2N
for clone): the distance from the physical limit. ``test_concepts`` times steps of ``fdu.erase`` on the embedded
pipeline.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from candidates import CLONE_PASSES, FORMS, Call, candidate, check, fused_backends, inputs
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

BATCHES = (1, 4, 16, 64, 256, 1024, 8192)
"""Of 4x64x64 latents: from 64 KiB to 512 MiB a tensor."""
ELEMENTS = (256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304)
"""Of each of SAMPLES samples."""
SAMPLES = 4
ROTATING = 128 << 20
"""Bytes that the rotating inputs exceed together; more than the caches hold."""
CONCEPTS = {1: ("three",), 2: ("three", "seven"), 4: ("three", "seven", "five", "two")}
ANCHOR = "eight"
STEPS = 8
"""Steps of an erasure that is timed; the first is not counted."""


def pairs_of(shape: tuple[int, ...], rotating: int = ROTATING, most: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Random inputs for the rounds to go through."""
    size = 8 * torch.Size(shape).numel()
    pairs = [inputs(shape, torch.float32, "cpu", seed) for seed in range(min(most, max(2, -(-rotating // size))))]
    for _, target in pairs:
        target.requires_grad_(False)
    return pairs


def candidates_of(form: str) -> dict[str, Call]:
    """Those of a sweep, by name; the reference backend has eager PyTorch beside it."""
    baselines = {which: candidate(form, which, "torch") for which in ("eager", "compiled")}
    ours = {name: candidate(form, "value_and_grad", name) for name in [*fused_backends("cpu"), "torch"]}
    return {**baselines, **ours}


def sweep(shape: tuple[int, ...], runs: dict[str, Call], rounds: int, rotating: int = ROTATING) -> dict[str, Any]:
    """Medians and quartiles of seconds, and shares of clone's bandwidth, by candidate."""
    pairs = pairs_of(shape, rotating)
    for run in runs.values():
        check(run, "gaussian", *pairs[0])
    calls: dict[str, Callable[[Tensor, Tensor], object]] = {"clone": lambda pred, _: pred.detach().clone(), **runs}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = itertools.cycle(pairs)
    for number in range(rounds + 2):
        for name, call in calls.items():
            pred, target = next(order)
            start = time.perf_counter()
            call(pred, target)
            if number >= 2:
                times[name].append(time.perf_counter() - start)
    passes = FORMS["gaussian"].passes / CLONE_PASSES
    shares = {
        name: statistics.median(passes * cloned / taken for cloned, taken in zip(times["clone"], mine, strict=True))
        for name, mine in times.items()
        if name != "clone"
    }
    return {
        "shape": list(shape),
        "bytes": 4 * torch.Size(shape).numel(),
        "pairs": len(pairs),
        "medians": {name: statistics.median(mine) for name, mine in times.items()},
        "quartiles": {name: statistics.quantiles(mine, n=4)[::2] for name, mine in times.items()},
        "share": shares,
    }


def rounds_for(elements: int) -> int:
    """Fewer for what takes long."""
    return max(9, min(101, 100_000_000 // elements))


@pytest.mark.parametrize("batch", BATCHES)
def test_batch(benchmark: BenchmarkFixture, batch: int) -> None:
    """Latents of Stable Diffusion 1.5."""
    shape = (batch, 4, 64, 64)
    runs = candidates_of("gaussian")
    found = benchmark.pedantic(sweep, (shape, runs, rounds_for(torch.Size(shape).numel())), rounds=1)
    benchmark.extra_info.update(form="batch", **found)


@pytest.mark.parametrize("elements", ELEMENTS)
def test_elements(benchmark: BenchmarkFixture, elements: int) -> None:
    """A few samples of ever more elements."""
    shape = (SAMPLES, elements)
    runs = candidates_of("gaussian")
    found = benchmark.pedantic(sweep, (shape, runs, rounds_for(torch.Size(shape).numel())), rounds=1)
    benchmark.extra_info.update(form="elements", **found)


def erasure_step(concepts: tuple[str, ...], steps: int = STEPS) -> dict[str, float]:
    """Median seconds of a step that erases several concepts at once, and the loss it ended with."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import fdu
    from fdu.subjects.digits import pipeline as digits

    pipeline = digits.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    targets, anchors = zip(*(digits.concepts(name, ANCHOR) for name in concepts), strict=True)
    moments: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: moments.append(time.perf_counter()))
    try:
        result = fdu.erase(
            pipeline, targets, anchors, max_train_steps=steps, num_latents=4 * len(concepts), num_inference_steps=2
        )
    finally:
        hook.remove()
    losses = result.history["loss"]
    assert len(moments) == len(losses) == steps and all(loss == loss for loss in losses)
    return {
        "concepts": len(concepts),
        "step": statistics.median(after - before for before, after in itertools.pairwise(moments)),
        "batch": result.config.train_batch_size,
    }


@pytest.mark.parametrize("count", CONCEPTS)
def test_concepts(benchmark: BenchmarkFixture, count: int) -> None:
    """A step of the embedded pipeline; the concepts share its batch."""
    found = benchmark.pedantic(erasure_step, (CONCEPTS[count],), rounds=3)
    benchmark.extra_info.update(form="concepts", **found)
