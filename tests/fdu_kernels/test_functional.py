"""The losses: golden values, gradients, masks, strides, precision, and the ends of the number range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fdu_kernels as fk

SMOOTH = ["mse", "kl", "squared_hellinger", "pearson_chi2", "alpha:0.3", "jensen_shannon", "le_cam", "shifted_log"]
SHAPES = [(1,), (5,), (3, 7), (2, 4, 3, 3), (2, 2, 2, 3, 2)]


def pair(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return pred, target


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
