"""Divergences from a user's generator: they reproduce the catalogue, and what is no generator is refused."""

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

NAMES = ["kl", "reverse_kl", "jeffreys", "pearson_chi2", "squared_hellinger", "jensen_shannon", "total_variation",
         "le_cam", "shifted_log", "skew_jensen_shannon", "alpha:0.3", "alpha:-0.5"]  # fmt: skip


def made(name: str) -> Divergence:
    generator = fk.get_divergence(name).generator
    assert generator is not None
    return Divergence.from_generator(generator, name="mine")


@pytest.mark.parametrize("name", NAMES)
def test_reproduces_the_catalogue(name: str) -> None:
    mine, own = made(name), fk.get_divergence(name)
    s = torch.logspace(-6, math.log10(40), 40, dtype=torch.float64)
    torch.testing.assert_close(mine.profile(s), own.profile(s), rtol=1e-9, atol=0)
    torch.testing.assert_close(mine.profile_grad(s), own.profile_grad(s), rtol=1e-9, atol=0)
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
        (lambda u: u.sum(), TypeError, "same shape"),
        (lambda u: (u.float() - 1) ** 2, TypeError, "same shape.*dtype.*torch.float64.*returned torch.float32"),
        (lambda u: 0.0, TypeError, "PyTorch operations.*torch.log instead.*math.log.*it returned float"),
        (lambda u: torch.ones_like(u), TypeError, "PyTorch operations.*does not depend.*u"),
        (lambda u: u * math.log(u), TypeError, "PyTorch operations.*torch.log"),
        (lambda u: u * np.log(u), TypeError, "PyTorch operations.*numpy"),
        (lambda u: torch.log(torch.from_numpy(np.asarray(u))), TypeError, "PyTorch operations.*numpy"),
        (lambda u: 3 * (u - 1), ValueError, "no finite, positive curvature"),
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
