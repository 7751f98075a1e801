"""The losses: golden values, gradients, masks, dtypes, extremes; and a message for every argument that does not fit."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import kernel_testing
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fdu_kernels as fk

SMOOTH = ["mse", "kl", "squared_hellinger", "pearson_chi2", "alpha:0.3", "jensen_shannon", "le_cam", "shifted_log"]
SHAPES = [(1,), (5,), (3, 7), (2, 4, 3, 3), (2, 2, 2, 3, 2)]


pair = functools.partial(kernel_testing.pair, dtype=torch.float64)


def test_golden_values_and_gradients(gaussian_row: tuple[str, Tensor, Tensor, Tensor]) -> None:
    name, s, h, slope = gaussian_row
    # One element a sample, so that s is the square of pred; s itself is rounded on the way.
    pred = s.sqrt().requires_grad_()
    loss = fk.gaussian_divergence(pred, torch.zeros_like(s), name, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    torch.testing.assert_close(loss.detach(), h, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, 2 * pred.detach() * slope, rtol=1e-12, atol=0)
    value, grad = fk.gaussian_divergence_value_and_grad(pred, torch.zeros_like(s), name, reduction="none")
    torch.testing.assert_close(value, h, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, 2 * pred.detach() * slope, rtol=1e-12, atol=0)


def test_mse_is_the_mean_squared_error() -> None:
    pred, target = pair(3, 4, 5)
    torch.testing.assert_close(fk.gaussian_divergence(pred, target, "mse"), torch.nn.functional.mse_loss(pred, target))


@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives(name: str) -> None:
    pred, target = pair(2, 3, 2)
    pred.requires_grad_()
    mask = torch.rand(2, 1, 2, dtype=torch.float64)

    def loss(pred: Tensor) -> Tensor:
        return fk.gaussian_divergence(pred, target, name, sigma=0.8, mask=mask, distance="sum")

    assert gradcheck(loss, (pred,))
    assert gradgradcheck(loss, (pred,))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("distance", ["mean", "sum"])
@pytest.mark.parametrize("name", fk.divergences())
def test_value_and_grad_equals_autograd(name: str, distance: str, reduction: str) -> None:
    pred, target = pair(4, 3, 2, 2)
    sigma, weight = torch.tensor([0.5, 1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, 2.0, 0.5]).double()
    mask = torch.rand(4, 1, 2, 2) > 0.3
    mask[3] = False
    pred.requires_grad_()
    options = {"sigma": sigma, "weight": weight, "mask": mask, "distance": distance, "reduction": reduction}
    expected = fk.gaussian_divergence(pred, target, name, **options)
    (expected_grad,) = torch.autograd.grad(3 * expected.sum(), pred)
    buffer = torch.full_like(pred, math.nan)
    buffer.requires_grad_(False)
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, name, **options, grad_scale=3.0, grad_out=buffer)
    assert grad.data_ptr() == buffer.data_ptr() and not value.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=0)
    scaled = fk.gaussian_divergence_value_and_grad(pred, target, name, **options, grad_scale=torch.tensor(3.0))[1]
    torch.testing.assert_close(scaled, grad, rtol=0, atol=0)
    assert bool((grad[3] == 0).all()) and bool((grad[1] == 0).all())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("parametrization", ["log_ratio", "fgan"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["kl", "jensen_shannon", "total_variation", "pearson_chi2"])
def test_variational_value_and_grad_equals_autograd(
    name: str, masked: bool, parametrization: str, reduction: str
) -> None:
    p, q = pair(3, 1, 4, 4)
    mask = torch.rand(3, 1, 4, 4) > 0.5 if masked else None
    p.requires_grad_()
    q.requires_grad_()
    options = {"mask": mask, "parametrization": parametrization, "reduction": reduction}
    expected = fk.variational_divergence(p, q, name, **options)
    expected_grads = torch.autograd.grad(0.5 * expected.sum(), (p, q))
    value, *grads = fk.variational_divergence_value_and_grad(p, q, name, **options, grad_scale=0.5)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=1e-15)
    for actual, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-13, atol=1e-16)
    model = fk.variational_model_loss(q, name, **options)
    (model_grad,) = torch.autograd.grad(0.5 * model.sum(), q)
    torch.testing.assert_close(model_grad, grads[1], rtol=1e-13, atol=1e-16)


def test_variational_mean_runs_over_the_mask_and_shapes_may_differ() -> None:
    p, q = torch.randn(6).double(), torch.randn(4, 3).double()
    a, b = fk.get_divergence("kl").critic(p)[0], fk.get_divergence("kl").critic(q)[1]
    torch.testing.assert_close(fk.variational_divergence(p, q, "kl"), a.mean() - b.mean())
    mask = torch.tensor([1.0, 0.0, 0.5]).double()
    expected = -(mask * b).sum() / (4 * 1.5)
    torch.testing.assert_close(fk.variational_model_loss(q, "kl", mask=mask), expected)
    nothing = fk.variational_divergence_value_and_grad(p, p, "kl", mask=torch.zeros(6, dtype=torch.bool))
    assert all(bool((part == 0).all()) for part in nothing)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("samples_from", ["q", "p"])
@pytest.mark.parametrize("name", [name for name in fk.divergences() if name != "mse"])
def test_density_ratio(name: str, samples_from: str, reduction: str) -> None:
    v, _ = pair(3, 4)
    weight = torch.tensor([1.0, 0.0, 2.5]).double()
    divergence = fk.get_divergence(name)
    u = torch.exp(v)
    terms = weight[:, None] * (divergence.f(u) if samples_from == "q" else divergence.f(u) / u)
    expected = {"none": terms, "mean": terms.mean(), "sum": terms.sum()}[reduction]
    v.requires_grad_()
    estimate = fk.density_ratio_divergence(v, name, samples_from, weight, reduction)
    (expected_grad,) = torch.autograd.grad(estimate.sum(), v)
    torch.testing.assert_close(estimate.detach(), expected, rtol=1e-10, atol=1e-13)
    value, grad = fk.density_ratio_divergence_value_and_grad(v, name, samples_from, weight, reduction)
    torch.testing.assert_close(value, estimate.detach(), rtol=0, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-13, atol=1e-16)


def test_estimates_converge_to_the_gaussian_profile() -> None:
    # p = N(1, 1), q = N(0, 1): log p/q = x - 1/2, s = 1.
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    for name in ("kl", "squared_hellinger", "jensen_shannon", "total_variation", "le_cam"):
        truth = fk.get_divergence(name).profile(torch.ones((), dtype=torch.float64)).item()
        log_p, log_q = (x + 1) - 0.5, x - 0.5
        assert fk.density_ratio_divergence(log_q, name, "q").item() == pytest.approx(truth, rel=0.03)
        assert fk.density_ratio_divergence(log_p, name, "p").item() == pytest.approx(truth, rel=0.03)
        assert fk.variational_divergence(log_p, log_q, name).item() == pytest.approx(truth, rel=0.03)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 4, 5), (4, 5), (1, 1, 4, 5), (5,), (2, 3, 1, 1), ()])
def test_masks_of_every_form(shape: tuple[int, ...], kind: str) -> None:
    pred, target = pair(2, 3, 4, 5)
    torch.manual_seed(1)
    mask = torch.rand(shape).double() if kind == "float" else torch.rand(shape) > 0.2
    full = mask.double().expand(pred.shape)
    s = (full * (pred - target) ** 2).flatten(1).sum(1)
    total = full.flatten(1).sum(1)
    mean = torch.where(total > 0, s / total, 0.0)
    torch.testing.assert_close(fk.squared_distance(pred, target, mask=mask), mean)
    torch.testing.assert_close(fk.squared_distance(pred, target, mask=mask, distance="sum", sigma=2.0), s / 4)


@pytest.mark.parametrize("name", fk.divergences())
def test_an_empty_mask_row_gives_zero(name: str) -> None:
    pred, target = pair(3, 2, 2, 2)
    mask = torch.ones(3, 1, 2, 2, dtype=torch.bool)
    mask[1] = False
    pred.requires_grad_()
    for distance in ("mean", "sum"):
        loss = fk.gaussian_divergence(pred, target, name, mask=mask, distance=distance, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        assert loss[1] == 0 and loss[0] > 0
        assert bool((grad[1] == 0).all()) and bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("name", fk.divergences())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_equal_outputs_give_zero_value_and_gradient(name: str, dtype: torch.dtype) -> None:
    pred = torch.randn(2, 5).to(dtype).requires_grad_()
    loss = fk.gaussian_divergence(pred, pred.detach().clone(), name)
    (grad,) = torch.autograd.grad(loss, pred)
    assert loss == 0 and bool((grad == 0).all())


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    name=st.sampled_from(SMOOTH),
    distance=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_every_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, name: str, distance: str, seed: int) -> None:
    pred, target = pair(*shape, dtype=dtype, seed=seed)
    # sigma keeps the gradient of pearson_chi2 within float16.
    exact_pred, exact_target = pred.double(), target.double()
    truth, truth_grad = fk.gaussian_divergence_value_and_grad(
        exact_pred, exact_target, name, distance=distance, sigma=6
    )
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, name, distance=distance, sigma=6)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype and grad.shape == pred.shape
    s = float(fk.squared_distance(exact_pred, exact_target, sigma=6, distance=distance).max())
    tolerance = 2e-6 * max(1.0, s)
    torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=0)
    rounding = torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).tiny
    torch.testing.assert_close(grad.double(), truth_grad, rtol=tolerance + rounding, atol=tiny)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mse", "squared_hellinger", "pearson_chi2", "alpha:0.3", "jensen_shannon"])
def test_gradients_in_half_precision_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    pred, target = pair(4, 4, 16, 16, dtype=dtype)
    # A gradient scale as of a GradScaler keeps float16 out of its subnormal numbers.
    scale = 2.0**14
    exact = fk.gaussian_divergence_value_and_grad(pred.double(), target.double(), name, grad_scale=scale)[1]
    single = fk.gaussian_divergence_value_and_grad(pred.float(), target.float(), name, grad_scale=scale)[1].to(dtype)
    allowed = (single.double() - exact).abs().max()
    grad = fk.gaussian_divergence_value_and_grad(pred, target, name, grad_scale=scale)[1]
    leaf = pred.clone().requires_grad_()
    (fk.gaussian_divergence(leaf, target, name) * scale).backward()
    assert leaf.grad is not None
    for found in (grad, leaf.grad):
        assert (found.double() - exact).abs().max() <= allowed


def test_strides_do_not_matter() -> None:
    pred, target = pair(2, 4, 6, 6)
    expected_value, expected_grad = fk.gaussian_divergence_value_and_grad(pred, target)
    variants = {
        "channels_last": pred.to(memory_format=torch.channels_last),
        "transposed": pred.transpose(0, 3).contiguous().transpose(0, 3),
        "sliced": torch.stack([pred, pred], -1)[..., 0],
    }
    for variant in variants.values():
        value, grad = fk.gaussian_divergence_value_and_grad(variant, target)
        torch.testing.assert_close(value, expected_value, rtol=1e-14, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-14, atol=0)
    assert fk.gaussian_divergence_value_and_grad(variants["channels_last"], target)[1].is_contiguous(
        memory_format=torch.channels_last
    )
    broadcast = fk.gaussian_divergence(pred, target[:1].expand(2, 4, 6, 6))
    torch.testing.assert_close(broadcast, fk.gaussian_divergence(pred, target[:1].repeat(2, 1, 1, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", fk.divergences())
def test_overflow_zone_is_finite(name: str, dtype: torch.dtype) -> None:
    pred = torch.tensor([[30.0], [300.0], [1000.0]], dtype=dtype, requires_grad=True)
    loss = fk.gaussian_divergence(pred, torch.zeros_like(pred), name, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("name", fk.divergences())
def test_nan_stays_nan(name: str) -> None:
    pred, target = pair(3, 4)
    pred[1, 2] = math.nan
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, name, reduction="none")
    assert value.isnan().tolist() == [False, True, False]
    assert bool(grad[1].isnan().any()) and not bool(grad[[0, 2]].isnan().any())
    if name != "mse":
        v = torch.tensor([0.3, math.nan])
        assert fk.variational_model_loss(v, name, reduction="none").isnan().tolist() == [False, True]
        assert fk.density_ratio_divergence(v, name, reduction="none").isnan().tolist() == [False, True]


def test_only_pred_gets_a_gradient() -> None:
    pred, target = (x.requires_grad_() for x in pair(2, 3))
    sigma, weight = torch.ones(2).double().requires_grad_(), torch.ones(2).double().requires_grad_()
    mask = torch.ones(2, 3).double().requires_grad_()
    fk.gaussian_divergence(pred, target, sigma=sigma, weight=weight, mask=mask).backward()
    assert pred.grad is not None
    assert target.grad is sigma.grad is weight.grad is mask.grad is None


@pytest.mark.parametrize("name", ["squared_hellinger", "pearson_chi2"])
def test_traces_without_graph_breaks(name: str) -> None:
    pred, target = pair(2, 3)
    pred.requires_grad_()
    compiled = torch.compile(fk.gaussian_divergence, fullgraph=True, backend="aot_eager")
    expected = fk.gaussian_divergence(pred, target, name)
    actual = compiled(pred, target, name)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    for result in zip(torch.autograd.grad(actual, pred), torch.autograd.grad(expected, pred), strict=True):
        torch.testing.assert_close(*result, rtol=1e-12, atol=0)


ONES = torch.ones(2, 3)
BOTH = torch.ones(2, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pred": [1.0]}, TypeError, "pred.*tensor, not list"),
        ({"pred": torch.ones(2, 3, dtype=torch.int64)}, TypeError, r"pred.*float16.*not int64.*pred\.float\(\)"),
        ({"target": torch.ones(2, 3, dtype=torch.bool)}, TypeError, "target.*float16.*not bool"),
        ({"pred": ONES.to_sparse()}, TypeError, r"pred.*dense tensor.*pass pred\.to_dense\(\)"),
        ({"target": ONES.to_mkldnn()}, TypeError, "target.*dense tensor"),
        ({"pred": torch.nested.nested_tensor([ONES], layout=torch.jagged)}, TypeError, "pred.*dense.*padded"),
        ({"weight": ONES[:, 0].to_sparse()}, TypeError, "weight.*dense tensor"),
        ({"mask": ONES.to_sparse()}, TypeError, "mask.*dense tensor"),
        ({"sigma": np.float32(0.7)}, TypeError, r"not float32.*pass torch.as_tensor\(sigma\)"),
        ({"pred": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "not complex64"),
        ({"target": torch.ones(2, 4)}, ValueError, r"pred.*\[2, 3\].*target \[2, 4\]; expand"),
        ({"target": ONES.to("meta")}, ValueError, "pred.*cpu.*target.*meta; move"),
        ({"pred": torch.ones(()), "target": torch.ones(())}, ValueError, r"pred.*shape \[B.*pred\[None\]"),
        ({"pred": torch.ones(0, 3), "target": torch.ones(0, 3)}, ValueError, "skip the empty batch"),
        ({"sigma": 0.0}, ValueError, r"sigma.*positive, not 0\.0"),
        ({"sigma": float("nan")}, ValueError, "sigma.*positive, not nan"),
        ({"sigma": -1}, ValueError, "sigma.*positive, not -1"),
        ({"sigma": "1"}, TypeError, r"sigma.*number.*tensor \[B\], not str '1'"),
        ({"sigma": torch.tensor([1.0, 0.0])}, ValueError, "sigma.*positive.*smallest value.*0"),
        ({"sigma": torch.ones(3)}, ValueError, r"sigma.*one number per sample, shape \[2\], not \[3\]"),
        ({"sigma": torch.ones(2, dtype=torch.int32)}, TypeError, "sigma.*float16.*not int32"),
        ({"sigma": torch.ones(2, device="meta")}, ValueError, "sigma.*meta.*pred.*cpu"),
        ({"weight": 1.0}, TypeError, r"weight.*None.*tensor \[B\], not float"),
        (
            {"weight": torch.ones(2, 1)},
            ValueError,
            r"weight.*one number per sample, shape \[2\], not \[2, 1\]",
        ),
        ({"weight": torch.tensor([1.0, -2.0])}, ValueError, "weight.*not.*negative.*-2"),
        ({"weight": torch.tensor(1.0)}, ValueError, r"shape \[2\], not \[\]"),
        ({"mask": [True]}, TypeError, "mask.*None.*tensor, not list"),
        (
            {"mask": torch.ones(2, 3, dtype=torch.int64)},
            TypeError,
            r"mask.*bool.*floating, not int64.*mask\.bool",
        ),
        ({"mask": torch.ones(2, 4)}, ValueError, r"mask \[2, 4\].*not broadcast.*pred \[2, 3\]"),
        ({"mask": torch.ones(1, 2, 3)}, ValueError, r"mask \[1, 2, 3\] does not broadcast"),
        ({"mask": torch.full((2, 3), -1.0)}, ValueError, "mask.*not.*negative.*-1"),
        ({"mask": torch.ones(3, device="meta")}, ValueError, "mask.*meta.*pred.*cpu"),
        ({"distance": "max"}, ValueError, 'distance must be "mean" or "sum", not \'max\''),
        ({"reduction": "max"}, ValueError, 'reduction must be "none" or "mean" or "sum", not \'max\''),
        ({"divergence": "kll"}, ValueError, "unknown divergence 'kll'; closest: kl"),
        ({"grad_scale": "2"}, TypeError, "grad_scale.*number"),
        ({"grad_scale": np.float32(2)}, TypeError, r"not np.float32\(2.0\); pass float\(grad_scale\)"),
        (
            {"grad_scale": torch.ones(2)},
            ValueError,
            r"grad_scale.*number.*tensor \[\], not.*shape \[2\]",
        ),
        ({"grad_out": ONES.to_sparse()}, TypeError, "grad_out.*dense tensor"),
        ({"grad_out": torch.ones(3, 2)}, ValueError, "grad_out.*pred.*equal shapes"),
        ({"grad_out": ONES.double()}, TypeError, "grad_out.*dtype.*pred, float32, not float64"),
        ({"grad_out": ONES.clone().requires_grad_()}, ValueError, "grad_out.*written.*place"),
        ({"grad_out": ONES}, ValueError, r"grad_out.*not share.*storage.*pred.*empty_like\(pred\)"),
        ({"pred": ONES.clone(), "grad_out": ONES}, ValueError, "grad_out.*not share.*storage.*target"),
        ({"pred": BOTH[0], "grad_out": BOTH[1]}, ValueError, "grad_out.*not share.*storage.*pred"),
        ({"mask": BOTH[0], "grad_out": BOTH[1]}, ValueError, "grad_out.*not share.*storage.*mask"),
        ({"grad_out": torch.ones(1, 3).expand(2, 3)}, ValueError, "grad_out.*not.*expanded tensor"),
        ({"grad_out": torch.ones(2, 3)._neg_view()}, ValueError, "grad_out.*not.*negative bit"),
    ],
)
def test_gaussian_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"pred": ONES, "target": ONES, **arguments}
    with pytest.raises(error, match=message):
        fk.gaussian_divergence_value_and_grad(**arguments)
    if not {"grad_scale", "grad_out"} & set(arguments):
        with pytest.raises(error, match=message):
            fk.gaussian_divergence(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"log_ratio_p": torch.ones(3).cfloat()},
            TypeError,
            r"log_ratio_p.*float16.*view_as_real\(log_ratio_p\)",
        ),
        (
            {"log_ratio_p": torch.ones(4), "reduction": "none"},
            ValueError,
            r"log_ratio_p.*\[4\].*log_ratio_q \[3\]",
        ),
        ({"mask": torch.ones(4)}, ValueError, r"mask \[4\].*not broadcast.*log_ratio_p \[3\]"),
    ],
)
def test_variational_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"log_ratio_p": torch.ones(3), "log_ratio_q": torch.ones(3), **arguments}
    for function in (fk.variational_divergence, fk.variational_divergence_value_and_grad):
        with pytest.raises(error, match=message):
            function(**arguments)


FUNCTIONS = {
    fk.squared_distance: ("pred", "target"),
    fk.gaussian_divergence: ("pred", "target"),
    fk.gaussian_divergence_value_and_grad: ("pred", "target"),
    fk.variational_divergence: ("log_ratio_p", "log_ratio_q"),
    fk.variational_divergence_value_and_grad: ("log_ratio_p", "log_ratio_q"),
    fk.variational_model_loss: ("log_ratio_q",),
    fk.density_ratio_divergence: ("log_ratio",),
    fk.density_ratio_divergence_value_and_grad: ("log_ratio",),
}
WRONG: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "divergence": [
        ("helinger", ValueError, "unknown divergence 'helinger'; closest: squared_hellinger"),
        ("alpha:0", ValueError, 'alpha must not be 0.*use "reverse_kl"'),
        ("alpha:1", ValueError, 'alpha must not be 1.*use "kl"'),
        (None, TypeError, "divergence must be a name or a Divergence, not NoneType"),
    ],
    "sigma": [(0, ValueError, "sigma must be positive, not 0"), (-ONES[:, 0], ValueError, "smallest value is -1")],
    "weight": [
        (-ONES[:, 0], ValueError, "weight must not be negative, but its smallest value is -1"),
        (ONES[:, 0].int(), TypeError, "weight must be float16.* not int32"),
        (ONES[0], ValueError, r"weight must have one number per sample, shape \[2\], not \[3\]"),
        (ONES[:, 0].to("meta"), ValueError, "weight is on meta and .* on cpu"),
    ],
    "mask": [
        (-ONES, ValueError, "mask must not be negative, but its smallest value is -1"),
        (ONES.int(), TypeError, "mask must be bool or floating, not int32"),
        (ONES.T, ValueError, r"mask \[3, 2\] does not broadcast to .* \[2, 3\]"),
        (ONES.to("meta"), ValueError, "mask is on meta and .* on cpu"),
    ],
    "distance": [("max", ValueError, "distance must be")],
    "reduction": [("max", ValueError, "reduction must be")],
    "parametrization": [("gan", ValueError, 'parametrization must be "log_ratio" or "fgan", not \'gan\'')],
    "samples_from": [("r", ValueError, 'samples_from must be "q" or "p", not \'r\'')],
    "backend": [("cudda", ValueError, "backend asks for the unknown backend 'cudda'; known: .*torch")],
    "grad_scale": [
        ("2", TypeError, "grad_scale must be a number"),
        (ONES, ValueError, r"grad_scale must be a number or a tensor \[\]"),
    ],
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_every_function_refuses(function: Callable[..., Any]) -> None:
    tensors = dict.fromkeys(FUNCTIONS[function], ONES)
    for name in inspect.signature(function).parameters:
        for value, error, message in WRONG.get(name, []):
            with pytest.raises(error, match=message):
                function(**{**tensors, name: value})
    for name in tensors:
        with pytest.raises(TypeError, match=rf"{name} must be float16.*not int64.*{name}\.float\(\)"):
            function(**{**tensors, name: ONES.long()})
        with pytest.raises(TypeError, match=f"{name} must be float16.*not complex64.*view_as_real") as refusal:
            function(**{**tensors, name: ONES.cfloat()})
        assert ".float()" not in str(refusal.value)
        with pytest.raises(TypeError, match=f"{name} must be a tensor, not list"):
            function(**{**tensors, name: [1.0]})
        if len(tensors) > 1:
            with pytest.raises(ValueError, match="must.*same device.*on meta"):
                function(**{**tensors, name: ONES.to("meta")})
    if tensors.keys() & {"log_ratio", "log_ratio_q"}:
        with pytest.raises(ValueError, match='\'mse\'.*use "kl" or "jeffreys"'):
            function(**tensors, divergence="mse")


def test_values_of_tensors_are_read_on_the_cpu_only() -> None:
    # A meta tensor has no values: a look at them would raise.
    pred = torch.empty(2, 3, device="meta")
    sigma, mask = torch.empty(2, device="meta"), torch.empty(3, device="meta")
    assert fk.squared_distance(pred, pred, sigma, mask).shape == (2,)
