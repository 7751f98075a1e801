"""Random shapes, layouts, dtypes, masks, parameters and extremes: every fused backend agrees with the reference.

Triton's interpreter is slow: where it runs (see test_triton.py), it alone is tested here, with fewer examples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernel_testing import check_density_ratio, check_gaussian, check_variational, laid_out
from torch import Tensor

import fdu_kernels as fk

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else [name for name in fk.backends() if name == "cpu" and not fk.backends()[name]]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EXTREMES = [0.0, 1e-20, 1e-6, 7.9, 1e4, 65504.0, 1e9, math.inf, math.nan]
# Their squares leave float32. A critic's straight line would, times e^64, and two of them cancel to NaN.
LARGEST = [1e10, 3e19]
PARAMETERS = {"alpha": (-3.0, 4.0), "skew_jensen_shannon": (0.01, 0.99), "hockey_stick": (0.2, 5.0)}

pytestmark = pytest.mark.usefixtures("poisoned")
each_backend = pytest.mark.parametrize(
    "backend", BACKENDS or [pytest.param("", marks=pytest.mark.skip(reason="no fused backend can run here"))]
)
Test = TypeVar("Test", bound=Callable[..., None])


def examples(count: int) -> Callable[[Test], Test]:
    # The fixture only replaces functions: what it does is the same for every example.
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    phases = [Phase.generate] if INTERPRETED else list(Phase)
    return settings(
        phases=phases,
        max_examples=count // 5 if INTERPRETED else count,
        deadline=None,
        derandomize=True,
        suppress_health_check=checks,
    )


def dtypes() -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from([dtype for dtype in DTYPES if not (INTERPRETED and dtype == torch.float64)])


@st.composite
def spellings(draw: st.DrawFn, critics: bool) -> str:
    name = draw(st.sampled_from([name for name in fk.divergences() if not (critics and name == "mse")]))
    if name not in PARAMETERS:
        return name
    # 0 and 1 are the limits of alpha; next to them the generator's own numbers lose their digits.
    value = draw(st.floats(*PARAMETERS[name]).filter(lambda number: min(abs(number), abs(number - 1)) > 1e-3))
    return f"{name}:{value!r}"


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    batch = draw(st.integers(1, 5))
    if draw(st.integers(0, 4)) == 0:
        return batch, draw(st.sampled_from([0, 1023, 1025] if INTERPRETED else [0, 1023, 1025, 4097, 16385, 40001]))
    return batch, *draw(st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 17]), max_size=4))


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, extremes: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1.0, 1.0, 1e-4, 5.0]))
    tensor = (scale * torch.randn(shape, generator=generator)).to(dtype)
    if tensor.numel():
        places = st.tuples(st.integers(0, tensor.numel() - 1), st.sampled_from(extremes), st.sampled_from([1, -1]))
        for place, number, sign in draw(st.just([]) | st.lists(places, max_size=3)):
            tensor.view(-1)[place] = sign * number
    return laid_out(tensor, draw(st.sampled_from(["dense", "permuted", "sliced", "offset"])))


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor | None:
    if draw(st.booleans()):
        return None
    sizes = [draw(st.sampled_from([1, size])) for size in shape]
    sizes = sizes[draw(st.integers(0, len(sizes))) :]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    mask = torch.rand(sizes, generator=generator)
    mask = mask * (mask > draw(st.sampled_from([0.0, 0.3, 0.8, 1.0])))
    mask = draw(st.sampled_from([mask > 0, *(mask.to(dtype) for dtype in DTYPES)]))
    mask = laid_out(mask, draw(st.sampled_from(["dense", "permuted", "sliced"])))
    return mask.expand(shape) if draw(st.integers(0, 3)) == 0 else mask


@st.composite
def numbers_of_samples(draw: st.DrawFn, batch: int, smallest: float, largest: float) -> Tensor:
    given = draw(st.lists(st.floats(smallest, largest), min_size=batch, max_size=batch))
    numbers = torch.tensor(given, dtype=torch.float64).clamp(min=smallest).to(draw(st.sampled_from(DTYPES)))
    return draw(st.sampled_from([numbers, numbers.repeat_interleave(2)[::2], numbers[:1].expand(batch)]))


@st.composite
def gaussian_calls(draw: st.DrawFn) -> dict[str, Any]:
    shape, dtype = draw(shapes()), draw(dtypes())
    batch = shape[0]
    pred, target = (draw(tensors(shape, dtype, EXTREMES + LARGEST)) for _ in range(2))
    if draw(st.integers(0, 5)) == 0:
        target = target[:1].expand(shape)
    sigmas = numbers_of_samples(batch, 0.05, 20.0)
    grad_out = torch.full(shape, math.nan, dtype=dtype)
    return {
        "pred": pred,
        "target": target,
        "name": draw(spellings(critics=False)),
        "sigma": draw(st.floats(0.05, 20.0) | sigmas | sigmas.map(lambda sigma: sigma[0])),
        "weight": draw(st.none() | numbers_of_samples(batch, 0.0, 10.0)),
        "mask": draw(masks(shape)),
        "distance": draw(st.sampled_from(["mean", "sum"])),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "grad_scale": draw(st.sampled_from([1.0, 0.25, -3.0, 1024.0, torch.tensor(1.7)])),
        "grad_out": draw(st.none() | st.sampled_from(["dense", "permuted", "sliced"]).map(
            lambda layout: laid_out(grad_out, layout))),
    }  # fmt: skip


@each_backend
@examples(120)
@given(call=gaussian_calls())
def test_gaussian(backend: str, call: dict[str, Any]) -> None:
    value, grad = check_gaussian(backend, **call)
    unknown = (call["pred"].isnan() | call["target"].isnan()).reshape(len(grad), -1).any(1)
    assert bool(grad[unknown].isnan().all())
    assert bool(value[unknown].isnan().all()) if call["reduction"] == "none" else bool(unknown.any() <= value.isnan())


@each_backend
@examples(60)
@given(data=st.data(), shape=shapes(), dtype=dtypes(), name=spellings(critics=True))
def test_density_ratio(
    backend: str, data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, name: str
) -> None:
    v = data.draw(tensors(shape, dtype, EXTREMES))
    weight = data.draw(st.none() | numbers_of_samples(shape[0], 0.0, 10.0))
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]))
    grad_scale = data.draw(st.sampled_from([1.0, -3.0, 64.0]))
    check_density_ratio(backend, v, name, data.draw(st.sampled_from(["q", "p"])), weight, reduction, grad_scale)


@each_backend
@examples(60)
@given(data=st.data(), shape=shapes(), dtype=dtypes(), name=spellings(critics=True))
def test_variational(backend: str, data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    reduction = data.draw(st.sampled_from(["none", "mean", "sum"]))
    mask = data.draw(masks(shape))
    other = shape if reduction == "none" else (3, *shape)
    parametrization = data.draw(st.sampled_from(["log_ratio", "fgan"]))
    # f-GAN's polynomials have no straight line to continue them, and no rule at infinity.
    extremes = [number for number in EXTREMES if parametrization == "log_ratio" or not math.isinf(number)]
    p, q = data.draw(tensors(other, dtype, extremes)), data.draw(tensors(shape, dtype, extremes))
    grad_scale = data.draw(st.sampled_from([1.0, -3.0, 64.0]))
    check_variational(backend, p, q, name, mask, parametrization, reduction, grad_scale)


@each_backend
@examples(30)
@given(call=gaussian_calls())
def test_the_same_bits_on_every_run(backend: str, call: dict[str, Any]) -> None:
    options = {key: value for key, value in call.items() if key not in ("pred", "target", "name", "grad_out")}
    results = []
    for threads in (1, 1) if INTERPRETED else (1, 2, 3, 1):
        torch.set_num_threads(threads)
        arguments = (call["pred"].clone(), call["target"].clone(), call["name"])
        results.append(fk.gaussian_divergence_value_and_grad(*arguments, **options, backend=backend))
    for again in results[1:]:
        for one, other in zip(again, results[0], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
