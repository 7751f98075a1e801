"""Peak memory of a call beyond its inputs and gradients: ``pytest benchmarks/bench_memory.py``.

What a call needs beside the gradient it returns is what a training step has to have free when the loss is computed. By
the byte model ours need none of the size of the inputs; eager PyTorch holds several buffers of that size, in float32
also where the inputs are not. memory_peak.py says how it is measured; a call is timed once, and that figure is no
benchmark.
"""

from __future__ import annotations

import pytest
import torch
from candidates import DTYPES, FORMS, candidate, check, fused_backends, inputs
from memory_peak import bytes_of, peak_bytes
from pytest_benchmark.fixture import BenchmarkFixture

SHAPES = [(2, 4, 64, 64), (16, 16, 128, 128)]
OURS = ("autograd", "value_and_grad")


def measure(form: str, which: str, backend: str, dtype: str, shape: tuple[int, ...], where: str) -> dict[str, int]:
    """Bytes of one of the inputs, of the gradients, and of the peak beyond both."""
    a, b = inputs(shape, DTYPES[dtype], where)
    if FORMS[form].wanted == 1:
        b.requires_grad_(False)
    run = candidate(form, which, backend)
    check(run, form, a, b)
    value, *gradients = run(a, b)
    gradient = bytes_of(gradients)
    del value, gradients
    return {
        "input_bytes": bytes_of([a]),
        "gradient_bytes": gradient,
        "extra_bytes": peak_bytes(lambda: run(a, b), where) - gradient,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_memory(benchmark: BenchmarkFixture, form: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Eager and compiled PyTorch, and each of our backends by autograd and without."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    names = {which: (which, "torch") for which in ("eager", "compiled")}
    names.update({f"{name} {which}": (which, name) for name in fused_backends(where) for which in OURS})
    found: dict[str, dict[str, int]] = {}

    def every_candidate() -> None:
        for label, (which, backend) in names.items():
            found[label] = measure(form, which, backend, dtype, shape, where)

    benchmark.pedantic(every_candidate, rounds=1)
    benchmark.extra_info.update(form=form, dtype=dtype, shape=list(shape), memory=found)
