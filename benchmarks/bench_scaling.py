"""How cost grows with the batch, with the elements per sample, and with the concepts erased at once:
``python bench_scaling.py``, on the CPU; gpu_suite.py sweeps the same sizes on a GPU.

The sweeps time value_and_grad on every backend beside eager PyTorch, torch.compile and torch.clone. Each call takes the
next of several random inputs. Large inputs together exceed the caches. "share" is the share of clone's bandwidth by the
byte model, which counts 3N bytes for every competitor and 2N for clone. ``test_concepts`` times steps of ``fdu.erase``
on the digits pipeline.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time

import pytest
import timing
import torch
from competitors import FUSED, Shape, competitors_of, fused_backends, rotating

BATCHES = (1, 4, 16, 64, 256, 1024, 8192)
"""Numbers of 4x64x64 latents: from 64 KiB to 512 MiB per tensor."""
ELEMENTS = (256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304)
"""Numbers of elements in each of SAMPLES samples."""
SAMPLES = 4
CONCEPTS = ("three", "seven", "five", "two")
ANCHOR = "eight"
STEPS = 8
"""Steps of an erasure that is timed; the first is not counted."""


def sweep(benchmark: timing.BenchmarkFixture, form: str, shape: Shape) -> None:
    """Time all competitors at one size, with fewer rounds for what takes long; keep and print the figures."""
    named = competitors_of("gaussian", [*fused_backends("cpu"), "torch"], (FUSED,))
    runs = {name.removesuffix(f" {FUSED}"): run for name, run in named.items()}
    pairs = rotating("gaussian", shape, torch.float32, "cpu", timing.ROTATING)
    rounds = max(9, min(101, 100_000_000 // math.prod(shape)))
    found = benchmark.pedantic(timing.sweep, ("gaussian", runs, pairs, rounds), rounds=1)
    benchmark.extra_info.update(form=form, **found)
    timing.show("gaussian", shape, torch.float32, found["medians"])


@pytest.mark.parametrize("batch", BATCHES)
def test_batch(benchmark: timing.BenchmarkFixture, batch: int) -> None:
    """Latents of Stable Diffusion 1.5."""
    sweep(benchmark, "batch", (batch, 4, 64, 64))


@pytest.mark.parametrize("elements", ELEMENTS)
def test_elements(benchmark: timing.BenchmarkFixture, elements: int) -> None:
    """A few samples of ever more elements."""
    sweep(benchmark, "elements", (SAMPLES, elements))


def erasure_step(concepts: tuple[str, ...], steps: int = STEPS) -> dict[str, float]:
    """Median seconds per step of an erasure of several concepts at once, and its batch."""
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


@pytest.mark.parametrize("count", (1, 2, 4))
def test_concepts(benchmark: timing.BenchmarkFixture, count: int) -> None:
    """A step of the digits pipeline; the concepts share its batch."""
    found = benchmark.pedantic(erasure_step, (CONCEPTS[:count],), rounds=1)
    benchmark.extra_info.update(form="concepts", **found)
    print(f"\n{count} concepts, batch {found['batch']}: {found['step'] * 1e3:.0f} ms per step of fdu.erase")


if __name__ == "__main__":
    raise SystemExit(timing.run_alone(__file__))
