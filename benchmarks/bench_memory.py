"""Peak memory of a call beyond its inputs and gradients: ``python bench_memory.py``.

A training step needs this much free memory to compute the loss. Our losses hold no buffer of the inputs' size. Eager
PyTorch holds several, in float32 even if the inputs are in half precision. On the CPU torch's profiler reports every
allocation and release, except the kilobytes of partial sums in C++. On a GPU the caching allocator keeps the peak.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timing
import torch
from competitors import DTYPES, FORMS, Call, Shape, check, competitors_of, fused_backends, inputs
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

SHAPES = [(2, 4, 64, 64), (16, 16, 128, 128)]
MEMORY_EVENT = "[memory]"


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes of tensors that a call holds at once, with what it returns, beyond those before it. The call is
    made twice; the second one counts."""
    call()
    if device != "cuda":
        return once(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def once(call: Callable[[], object]) -> int:
    """The most bytes of tensors on the CPU that a single call holds at once, with what it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        kept = call()
    del kept
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == MEMORY_EVENT]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def measure(run: Call, a: Tensor, b: Tensor) -> dict[str, int]:
    """Bytes of one of the inputs, of the gradients, and of the peak beyond both."""
    gradient = sum(tensor.nbytes for tensor in run(a, b)[1:])
    extra = peak_bytes(lambda: run(a, b), a.device.type) - gradient
    return {"input_bytes": a.nbytes, "gradient_bytes": gradient, "extra_bytes": extra}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_memory(benchmark: timing.BenchmarkFixture, form: str, dtype: str, shape: Shape) -> None:
    """All competitors of a form, ours on every backend by autograd and without."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = competitors_of(form, fused_backends(device))

    def every_run() -> dict[str, dict[str, int]]:
        found = {}
        for name, run in runs.items():
            a, b = inputs(shape, DTYPES[dtype], device, wanted=FORMS[form].wanted)
            check(run, form, a, b)
            found[name] = measure(run, a, b)
        return found

    found = benchmark.pedantic(every_run, rounds=1)
    benchmark.extra_info.update(form=form, dtype=dtype, shape=shape, memory=found)
    print(f"\n{form} {dtype} {'x'.join(map(str, shape))}: peak beyond inputs and gradients, in tensors of their size")
    for name, one in found.items():
        print(f"  {name:<20}{one['extra_bytes'] / one['input_bytes']:8.3f}  ({one['extra_bytes']} bytes)")


if __name__ == "__main__":
    raise SystemExit(timing.run_alone(__file__))
