"""Divergences: the rows of the catalogue agree, spellings find them, and a generator of the user reproduces them."""

from __future__ import annotations

import copy
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels import Divergence
from fdu_kernels.catalogue import CATALOGUE
from fdu_kernels.scalar import derivative

WITH_CRITIC = [name for name in fk.divergences() if name != "mse"]


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_generator_and_critic_rows_agree(name: str) -> None:
    divergence = fk.get_divergence(name)
    v = torch.linspace(-5, 5, 100, dtype=torch.float64)
    u = torch.exp(v)
    a, b = divergence.critic(v)
    torch.testing.assert_close(a, derivative(divergence.f)(u), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b, u * derivative(divergence.f)(u) - divergence.f(u), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_generator_and_curvature_agree(name: str) -> None:
    divergence = fk.get_divergence(name)
    v = torch.linspace(-4, 4, 50, dtype=torch.float64)
    u = torch.exp(v)
    curvature = torch.zeros_like(v) if divergence.log_curvature is None else torch.exp(divergence.log_curvature(v))
    torch.testing.assert_close(curvature, u.square() * derivative(derivative(divergence.f))(u), rtol=1e-8, atol=1e-12)
    assert divergence.f(torch.ones((), dtype=torch.float64)) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_fgan_activation_is_bounded_by_the_divergence_of_gaussians(name: str) -> None:
    # E_p[T] - E_q[f*(T)] <= D_f for every v, by quadrature over two normal distributions with means -+1/2.
    divergence = fk.get_divergence(name)
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    p, q = (torch.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (0.5, -0.5))
    truth = divergence.profile(torch.ones((), dtype=torch.float64))
    for scale in (0.3, 1.0, 1.7):
        t, conjugate = divergence.critic(scale * x, "fgan")
        assert torch.trapezoid(p * t - q * conjugate, x) <= truth * (1 + 1e-6)
    a, b = divergence.critic(x)
    torch.testing.assert_close(torch.trapezoid(p * a - q * b, x), truth, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("name", "t", "conjugate"),
    [
        ("kl", lambda v: v, lambda t: torch.exp(t - 1)),
        ("reverse_kl", lambda v: -torch.exp(-v), lambda t: -1 - torch.log(-t)),
        ("pearson_chi2", lambda v: v, lambda t: t**2 / 4 + t),
        ("neyman_chi2", lambda v: 1 - torch.exp(v), lambda t: 2 - 2 * torch.sqrt(1 - t)),
        ("squared_hellinger", lambda v: (1 - torch.exp(-v)) / 2, lambda t: t / (1 - 2 * t)),
        ("total_variation", lambda v: torch.tanh(v) / 2, lambda t: t),
        ("jensen_shannon", lambda v: (math.log(2) - torch.log1p(torch.exp(-v))) / 2,
         lambda t: -torch.log(2 - torch.exp(2 * t)) / 2),
    ],
)  # fmt: skip
def test_fgan_rows_are_those_of_table_6(name: str, t, conjugate) -> None:  # type: ignore[no-untyped-def]
    v = torch.linspace(-3, 3, 61, dtype=torch.float64)
    actual_t, actual_conjugate = fk.get_divergence(name).critic(v, "fgan")
    torch.testing.assert_close(actual_t, t(v), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual_conjugate, conjugate(t(v)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", fk.divergences())
def test_values_stay_in_the_stated_range(name: str) -> None:
    divergence = fk.get_divergence(name)
    h = divergence.profile(torch.logspace(-8, 4, 200, dtype=torch.float64))
    assert bool((h >= 0).all()) and bool((h <= divergence.upper * (1 + 1e-12)).all())
    if math.isfinite(divergence.upper):
        assert h[-1].item() == pytest.approx(divergence.upper, rel=1e-9)


@pytest.mark.parametrize("name", fk.divergences())
def test_slope_at_zero(name: str) -> None:
    divergence = fk.get_divergence(name)
    found = float(divergence.profile_grad(torch.tensor(1e-12, dtype=torch.float64)))
    if math.isinf(divergence.slope_at_zero):
        assert found > 1e4
    else:
        assert found == pytest.approx(divergence.slope_at_zero, rel=1e-9)


def test_every_alias_finds_its_divergence() -> None:
    for name, entry in CATALOGUE.items():
        for alias in entry.aliases:
            assert fk.get_divergence(alias) == fk.get_divergence(name)
    spellings = [spelling for name, entry in CATALOGUE.items() for spelling in (name, *entry.aliases)]
    assert len(spellings) == len(set(spellings))
    assert fk.get_divergence(" Squared-Hellinger ") == fk.get_divergence("h")


def test_equality_is_by_value() -> None:
    one, other = fk.get_divergence("alpha", alpha=0.3), fk.get_divergence("alpha:0.3")
    assert one == other and hash(one) == hash(other)
    assert one != fk.get_divergence("alpha:0.4")
    assert fk.get_divergence("alpha:-0.5") == fk.get_divergence("alpha", alpha=-0.5)
    assert fk.get_divergence("skew_jensen_shannon:0.3") == fk.get_divergence("skew_jensen_shannon", w=0.3)
    assert fk.get_divergence("hockey_stick:2") == fk.get_divergence("hockey_stick", g=2)
    assert fk.get_divergence(one) is one


@pytest.mark.parametrize("spelling", ["kl", "alpha:0.30000000000000004", "hockey_stick:2", "alpha:-1"])
def test_spelling_and_pickle_round_trip(spelling: str) -> None:
    divergence = fk.get_divergence(spelling)
    assert str(divergence) == spelling
    assert fk.get_divergence(str(divergence)) == divergence
    assert pickle.loads(pickle.dumps(divergence)) == divergence
    assert copy.deepcopy(divergence) == divergence


def test_limits_of_alpha() -> None:
    s = torch.linspace(0, 5, 20, dtype=torch.float64)
    for alpha in (1 + 1e-9, 1e-9):
        torch.testing.assert_close(
            fk.get_divergence("alpha", alpha=alpha).profile(s), fk.get_divergence("kl").profile(s), rtol=1e-8, atol=0
        )


@pytest.mark.parametrize(
    ("spelling", "parameters", "error", "message"),
    [
        ("helinger", {}, ValueError, "unknown divergence 'helinger'; closest: squared_hellinger.*known: mse, kl"),
        ("alpha:0", {}, ValueError, 'alpha.*not.*0.*"reverse_kl"'),
        ("alpha:1", {}, ValueError, 'alpha.*not.*1.*"kl"'),
        ("alpha:x", {}, ValueError, "alpha.*divergence 'alpha'.*finite number, not 'x'"),
        ("alpha:inf", {}, ValueError, "must be a finite number"),
        ("alpha", {"beta": 1.0}, TypeError, "'alpha' takes alpha.*got 'beta'"),
        ("alpha:0.3", {"alpha": 0.3}, TypeError, "given twice"),
        ("kl:2", {}, TypeError, "'kl' takes no parameter.*got '2'"),
        ("skew_jensen_shannon:1", {}, ValueError, "strictly between 0 and 1, not 1"),
        ("hockey_stick:-1", {}, ValueError, "g.*hockey_stick.*positive, not -1"),
    ],
)
def test_bad_spellings(spelling: str, parameters: dict[str, float], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fk.get_divergence(spelling, **parameters)


def test_what_is_no_divergence() -> None:
    with pytest.raises(TypeError, match="must.*name.*Divergence, not int"):
        fk.get_divergence(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="with a Divergence"):
        fk.get_divergence(fk.get_divergence("alpha"), alpha=0.3)
    with pytest.raises(ValueError, match="'mse' has no generator"):
        fk.get_divergence("mse").f(torch.ones(1))


NAMES = ["kl", "reverse_kl", "jeffreys", "pearson_chi2", "squared_hellinger", "jensen_shannon", "total_variation",
         "le_cam", "shifted_log", "skew_jensen_shannon", "alpha:0.3", "alpha:-0.5"]  # fmt: skip


def made(name: str) -> Divergence:
    generator = fk.get_divergence(name).generator
    assert generator is not None
    return Divergence.from_generator(generator, name="mine")


@pytest.mark.parametrize("name", NAMES)
def test_a_users_generator_reproduces_the_critic_of_the_catalogue(name: str) -> None:
    mine, own = made(name), fk.get_divergence(name)
    v = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for actual, expected in zip(mine.critic(v), own.critic(v), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert mine.slope_at_zero == pytest.approx(own.slope_at_zero, rel=1e-12)


def test_losses_and_gradients_of_a_custom_divergence() -> None:
    torch.manual_seed(0)
    mine = made("jensen_shannon")
    pred, target = torch.randn(2, 5, 7, dtype=torch.float64)
    for actual, expected in zip(
        fk.gaussian_divergence_value_and_grad(pred, target, mine),
        fk.gaussian_divergence_value_and_grad(pred, target, "jensen_shannon"),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    v = torch.randn(2, 9, dtype=torch.float64)
    for actual, expected in zip(
        fk.variational_divergence_value_and_grad(v[0], v[1], mine),
        fk.variational_divergence_value_and_grad(v[0], v[1], "jensen_shannon"),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)
    for samples_from in ("q", "p"):
        leaf = v[0].clone().requires_grad_()
        estimate = fk.density_ratio_divergence(leaf, mine, samples_from)
        estimate.backward()
        expected, grad = fk.density_ratio_divergence_value_and_grad(v[0], "jensen_shannon", samples_from)
        torch.testing.assert_close(estimate.detach(), expected, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-10, atol=1e-13)


def test_a_kink_away_from_one_has_to_be_named() -> None:
    def hockey(u: Tensor) -> Tensor:
        return torch.clamp(u - 2, min=0)

    with pytest.raises(ValueError, match="kink.*not named"):
        Divergence.from_generator(hockey)
    mine = Divergence.from_generator(hockey, kinks=[2.0])
    s = torch.tensor([0.5, 2.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(mine.profile(s), fk.get_divergence("hockey_stick:2").profile(s), rtol=1e-12, atol=0)


def chi2_of_this_module(u: Tensor) -> Tensor:
    return (u - 1).square()


def test_a_loss_with_a_generator_of_a_module_pickles_and_a_lambda_says_why_not() -> None:
    loss = fk.GaussianDivergenceLoss(Divergence.from_generator(chi2_of_this_module, "mine"), sigma=0.5)
    sys.modules.setdefault(__name__, sys.modules.get(__name__) or types.ModuleType(__name__))
    sys.modules[__name__].chi2_of_this_module = chi2_of_this_module
    again = pickle.loads(pickle.dumps(loss))
    pred, target = torch.randn(2, 3, 4)
    assert again.divergence == loss.divergence and torch.equal(again(pred, target), loss(pred, target))
    own = fk.GaussianDivergenceLoss(Divergence.from_generator(lambda u: (u - 1).square(), "mine"))
    with pytest.raises(pickle.PicklingError, match="generator.*'mine'.*lambda.*local function.*with def"):
        pickle.dumps(own)
    assert copy.deepcopy(own).divergence is own.divergence
    named = fk.GaussianDivergenceLoss("alpha:0.3")
    assert pickle.loads(pickle.dumps(named)).divergence is named.divergence


def test_equality_is_that_of_the_generator() -> None:
    one = made("kl")
    assert one == made("kl") and hash(one) == hash(made("kl"))
    assert one != made("le_cam") and one != fk.get_divergence("kl")


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda u: u * torch.log(u) + 1, ValueError, r"must have f\(1\) = 0, but f\(1\) = 1"),
        (lambda u: torch.log(u), ValueError, "is not convex.*slope falls near u"),
        (lambda u: (u - 1) * (u - 2) * (u - 3), ValueError, "is not convex"),
        (lambda u: torch.log(u - 0.5) - math.log(0.5), ValueError, "is not finite"),
        (lambda u: u.sum(), TypeError, "shape and dtype"),
        (lambda u: (u.float() - 1) ** 2, TypeError, "torch.float64 and returned.*torch.float32"),
        (lambda u: 0.0, TypeError, "PyTorch operations.*torch.log instead.*math.log.*it returned float"),
        (lambda u: torch.ones_like(u), TypeError, "PyTorch operations.*does not depend.*u"),
        (lambda u: u * math.log(u), TypeError, "PyTorch operations.*torch.log"),
        (lambda u: u * np.log(u), TypeError, "PyTorch operations.*numpy"),
        (lambda u: torch.log(torch.from_numpy(np.asarray(u))), TypeError, "PyTorch operations.*numpy"),
        (lambda u: 3 * (u - 1), ValueError, "must be finite and positive"),
    ],
)
def test_what_is_no_generator(f, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        Divergence.from_generator(f, name="bad").profile(torch.ones(1))


def test_kinks_are_ratios() -> None:
    with pytest.raises(ValueError, match="points u > 0"):
        Divergence.from_generator(lambda u: (u - 1).abs(), kinks=[0.0])


def test_derivatives_of_the_generator_and_the_rows_of_its_critic() -> None:
    one, u = fk.get_divergence("kl"), torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(one.derivative(u), torch.log(u) + 1)
    torch.testing.assert_close(one.second_derivative(u), 1 / u)
    assert one.critic_rows("fgan") == one.fgan_rows and one.critic_rows("log_ratio") == one.log_ratio_rows
