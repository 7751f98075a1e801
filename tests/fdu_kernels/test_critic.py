"""A and B against the golden values, and far out in both tails."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_testing import size_of_terms
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fdu_kernels as fk
from fdu_kernels.scalar import MAX_EXPONENT, Scalar

WITH_CRITIC = [name for name in fk.divergences() if name != "mse"]


def critic_terms(divergence: fk.Divergence, parametrization: str) -> list[Scalar]:
    return [function.scalar() for function in divergence.critic_functions(parametrization)]


def test_golden_values(variational_row: tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    name, v, *expected = variational_row
    v = v.clone().requires_grad_()
    a, b = fk.get_divergence(name).critic(v)
    (a_slope,) = torch.autograd.grad(a.sum(), v)
    (b_slope,) = torch.autograd.grad(b.sum(), v)
    for actual, column in zip((a, b, a_slope, b_slope), expected, strict=True):
        torch.testing.assert_close(actual.detach(), column, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes(
    extreme_critic: tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    name, v, *columns = extreme_critic
    divergence = fk.get_divergence(name)
    terms, limits = critic_terms(divergence, "log_ratio"), torch.finfo(dtype)
    ratios = [divergence.ratio_function(side).scalar() for side in "qp"]
    functions = *(one.value_at for one in terms), *(one.slope_at for one in terms), *(one.value_at for one in ratios)
    if dtype == torch.float32:
        # v itself is rounded there: the truth is that of float64, which the other case of this test looks at.
        columns = [function(v.to(dtype).double()) for function in functions]
    found = [function(v.to(dtype)).double() for function in functions]
    for actual, truth in zip(found[:4], columns, strict=False):
        number = truth.abs() >= limits.smallest_normal
        torch.testing.assert_close(actual[number], truth[number], rtol=32 * limits.eps, atol=0)
    size = (torch.exp(v) * columns[0]).abs() + columns[1].abs()
    for actual, truth, factor in zip(found[4:], columns[4:], (1.0, torch.exp(-v)), strict=True):
        assert bool(((actual - truth).abs() <= 8 * limits.eps * size * factor).all())
    narrow = v.to(dtype)
    for ratio, truth, tilt in zip(ratios, columns[:2], (1, -1), strict=True):
        slope = truth * torch.exp(tilt * narrow.double())
        number = slope.abs() >= limits.smallest_normal
        torch.testing.assert_close(ratio.slope_at(narrow).double()[number], slope[number], rtol=32 * limits.eps, atol=0)


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_float32_keeps_its_digits(name: str) -> None:
    size = torch.cat([torch.logspace(-30, 0, 301), torch.linspace(1, 30, 2000)])
    v = torch.cat([-size, size])
    rows, eps = fk.get_divergence(name).log_ratio_rows, torch.finfo(torch.float32).eps
    assert rows is not None
    for row in rows:
        truth = row.value(v.double())
        # Its terms may cancel; those of the others do nowhere.
        scale = size_of_terms(row, v.double(), 0.0, False) if name == "shifted_log" else truth.abs()
        tiny = torch.finfo(torch.float32).smallest_normal
        assert bool(((row.value(v).double() - truth).abs() <= 32 * eps * scale + tiny).all())
        slope = row.slope(v.double())
        assert bool(((row.slope(v).double() - slope).abs() <= 32 * eps * slope.abs() + tiny).all())


def test_a_bounded_critic_keeps_its_digits_near_0() -> None:
    v = torch.tensor([-1e-3, -1e-20, 1e-30, 1e-6], dtype=torch.float64)
    for term in critic_terms(fk.get_divergence("total_variation"), "fgan"):
        torch.testing.assert_close(term.value_at(v), torch.tanh(v) / 2, rtol=1e-15, atol=0)
        torch.testing.assert_close(term.value_at(v.float()), torch.tanh(v).float() / 2, rtol=2e-7, atol=0)


def test_golden_values_through_the_api(variational_row: tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    name, v, a, b, a_slope, b_slope = variational_row
    zero = torch.zeros_like(v)
    _, b_zero = fk.get_divergence(name).critic(zero)
    value, grad_p, grad_q = fk.variational_divergence_value_and_grad(v, v, name, reduction="none")
    torch.testing.assert_close(grad_p, a_slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_q, -b_slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(value, a - b, rtol=1e-12, atol=1e-12 * float(torch.maximum(a.abs(), b.abs()).max()))
    torch.testing.assert_close(fk.variational_model_loss(v, name, reduction="none"), -b, rtol=1e-12, atol=0)
    only_a = fk.variational_divergence(v, zero, name, reduction="none") + b_zero
    torch.testing.assert_close(only_a, a, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("parametrization", ["log_ratio", "fgan"])
@pytest.mark.parametrize("name", [*WITH_CRITIC, "alpha:3", "alpha:-2"])
def test_large_arguments_are_finite(name: str, parametrization: str, dtype: torch.dtype) -> None:
    v = torch.cat([torch.linspace(-1e4, 1e4, 2001), torch.linspace(-100, 100, 999)]).to(dtype)
    for function in critic_terms(fk.get_divergence(name), parametrization):
        assert bool(torch.isfinite(function.value_at(v)).all())
        assert bool(torch.isfinite(function.slope_at(v)).all())
    assert bool(critic_terms(fk.get_divergence(name), parametrization)[0](v * torch.nan).isnan().all())


@pytest.mark.parametrize("samples_from", ["q", "p"])
@pytest.mark.parametrize("name", [*WITH_CRITIC, "alpha:3", "alpha:-2"])
def test_ratio_terms(name: str, samples_from: str) -> None:
    divergence = fk.get_divergence(name)
    function = divergence.ratio_function(samples_from).scalar()
    v = torch.linspace(-6, 6, 121, dtype=torch.float64)
    u = torch.exp(v)
    expected = divergence.f(u) if samples_from == "q" else divergence.f(u) / u
    torch.testing.assert_close(function.value_at(v), expected, rtol=1e-10, atol=1e-13)
    far = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4])
    assert not bool(function.value_at(far).isnan().any())
    assert bool(torch.isfinite(function.slope_at(far)).all())


@pytest.mark.parametrize("name", sorted({*WITH_CRITIC} - {"total_variation", "hockey_stick"}))
def test_second_derivatives(name: str) -> None:
    divergence = fk.get_divergence(name)
    v = torch.tensor([-2.3, -0.4, 0.0, 0.7, 3.1], dtype=torch.float64, requires_grad=True)
    for function in (
        *critic_terms(divergence, "log_ratio"),
        *critic_terms(divergence, "fgan"),
        divergence.ratio_function("p").scalar(),
    ):
        assert gradcheck(function, (v,))
        assert gradgradcheck(function, (v,))


def test_straight_line_joins_with_equal_slope() -> None:
    a, b = critic_terms(fk.get_divergence("pearson_chi2"), "log_ratio")
    end = MAX_EXPONENT / 2
    assert (a.high, b.high) == (end, end)
    ends = torch.tensor([end, end + 1, end + 2], dtype=torch.float64)
    values, slopes = b.value_at(ends), b.slope_at(ends)
    assert values[0].item() == pytest.approx(math.expm1(MAX_EXPONENT))
    torch.testing.assert_close(values[1:] - values[:-1], slopes[:-1], rtol=1e-12, atol=0)
    assert slopes[0] == slopes[1] == slopes[2]


def test_mse_has_no_critic() -> None:
    v = torch.zeros(3)
    for call in (
        lambda: fk.variational_divergence(v, v, "mse"),
        lambda: fk.density_ratio_divergence(v, "mse"),
        lambda: fk.VariationalDivergenceLoss("mse"),
        lambda: fk.DensityRatioDivergenceLoss("mse"),
    ):
        with pytest.raises(ValueError, match='use "kl" or "jeffreys"'):
            call()


def test_a_term_without_a_coefficient_is_none_at_infinity_and_a_nan_stays_one() -> None:
    v = torch.tensor([-math.inf, math.inf, math.nan], dtype=torch.float64)
    limits = {
        "kl": ([-math.inf, math.inf], [1.0, 1.0]),
        "jensen_shannon": ([-math.inf, math.log(2) / 2], [0.5, 0.0]),
        "le_cam": ([-1.5, 0.5], [0.0, 0.0]),
        "total_variation": ([-0.5, 0.5], [0.0, 0.0]),
    }
    for name, (values, slopes) in limits.items():
        a, _ = fk.get_divergence(name).critic(v)
        _, slope, _ = fk.variational_divergence_value_and_grad(v, v, name, reduction="none", backend="torch")
        torch.testing.assert_close(a[:2], torch.tensor(values, dtype=torch.float64))
        torch.testing.assert_close(slope[:2], torch.tensor(slopes, dtype=torch.float64))
        assert a[2].isnan() and slope[2].isnan()
    _, b = fk.get_divergence("pearson_chi2").critic(v, parametrization="fgan")
    assert b[0] == b[1] == math.inf
