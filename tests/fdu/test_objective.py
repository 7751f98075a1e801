"""The losses of a batch against formulas written out; a denoiser that multiplies stands for the real ones."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fdu_kernels as fk
from fdu.config import EraseConfig
from fdu.training.critic import Outputs
from fdu.training.examples import Batch
from fdu.training.objective import Objective
from fdu.training.timesteps import weights

STEPS = 50
SIGNAL = torch.linspace(0.99, 0.1, STEPS).double().sqrt()
NOISE = (1 - SIGNAL.square()).sqrt()
SHAPE = (4, 3, 2)
DENOISER: Any = SimpleNamespace(
    device=torch.device("cpu"), latent_shape=SHAPE, signal=SIGNAL, noise=NOISE, prediction_type="epsilon",
    predict=lambda noisy, indices, conditioning: noisy * conditioning.view(-1, 1, 1, 1) + indices.view(-1, 1, 1, 1),
)  # fmt: skip
EXAMPLES: Any = SimpleNamespace(conditioning=torch.tensor([2.0, 3.0, 5.0, 7.0]))


def objective(mask: Tensor | None = None, **settings: Any) -> Objective:
    return Objective(DENOISER, EraseConfig(**{"sigma": 2.0, "divergence": "squared_hellinger", **settings}), mask)


def outputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    predicted, wanted = (torch.randn(count, *SHAPE, generator=generator) for _ in range(2))
    return predicted, wanted


def batch(size: int = 2, kept: int = 2, **others: Any) -> Batch:
    """Samples that erase read prompt 0 and have the anchor 1; those that preserve have 2 and 3."""
    count = size + kept
    prompts = [0] * size, [1] * size, [2 + i % 2 for i in range(kept)]
    given = {
        "noisy": torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(9)),
        "indices": torch.arange(10, 10 + count),
        "timestep_weight": None,
        "noise": None,
        "reads": torch.tensor(prompts[0] + prompts[2]),
        "anchors": torch.tensor(prompts[1] + prompts[2]),
    }
    return Batch(size, **{**given, **others})


def squares(predicted: Tensor, wanted: Tensor) -> Tensor:
    return (predicted - wanted).square().flatten(1)


@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("squared_hellinger", 1 / 8),
        ("kl", 1 / 2),
        ("pearson_chi2", 1.0),
        ("total_variation", math.exp(-1 / 8) / math.sqrt(8 * math.pi)),  # of erf(sqrt(s/8)) at 1: at 0 it is infinite
    ],
)
def test_a_divergence_is_divided_by_its_slope(name: str, slope: float) -> None:
    goal, (predicted, wanted) = objective(divergence=name), outputs(3)
    assert goal.slope == pytest.approx(slope)
    s = squares(predicted, wanted).mean(1) / 4
    expected = fk.get_divergence(name).profile(s.double()).mean() / slope
    assert goal.erased(predicted, wanted, batch(3, 0))[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert goal.weighting is None and goal.game is None


def test_a_slope_of_zero_is_replaced_too() -> None:
    goal = objective(divergence="hockey_stick:2")
    assert fk.get_divergence("hockey_stick:2").slope_at_zero == 0
    assert 0 < goal.slope < 1


def test_distance_and_mask() -> None:
    predicted, wanted = outputs(2)
    mask = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    counted = ((predicted - wanted).square() * mask).flatten(1).sum(1) / 4
    for distance, s in (("sum", counted), ("mean", counted / 12)):
        goal = objective(mask, divergence="kl", distance=distance)
        found, _, its_s = goal.erased(predicted, wanted, batch(2, 0))
        assert found.item() == pytest.approx(s.mean().item(), rel=1e-5)
        torch.testing.assert_close(its_s.float(), s)
        torch.testing.assert_close(goal.losses(its_s, batch(2, 0)), s / 2)
        torch.testing.assert_close(goal.distance(its_s, batch(2, 0)).float(), 4 * s.median())
    # What preserves is not masked.
    goal = objective(mask, divergence="kl", distance="sum")
    all_of_it = squares(predicted, wanted)
    assert goal.kept(predicted, wanted).item() == pytest.approx((all_of_it.sum(1) / 4).mean().item(), rel=1e-5)
    mean = objective(mask, divergence="kl").kept(predicted, wanted)
    assert mean.item() == pytest.approx(all_of_it.mean().item() / 4, rel=1e-5)


@pytest.mark.parametrize("weighting", ["min_snr", "posterior", "p2"])
def test_weights_of_timesteps(weighting: Any) -> None:
    predicted, wanted = outputs(2)
    tables = weights(weighting, SIGNAL, NOISE, "epsilon", 3.0)
    own = torch.tensor([0.5, 3.0])
    s = squares(predicted, wanted).mean(1) / (2 * tables.scale[10:12]).square()
    goal = objective(divergence="kl", weighting=weighting, snr_gamma=3.0 if weighting == "min_snr" else None)
    for timestep_weight, factor in ((None, torch.ones(2)), (own, own)):
        given = batch(timestep_weight=timestep_weight)
        expected = (tables.omega[10:12] * factor * s).mean()
        found, _, its_s = goal.erased(predicted, wanted, given)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(goal.losses(its_s, given), tables.omega[10:12] * s / 2, rtol=1e-4, atol=0)
        plain = fk.squared_distance(predicted, wanted).median()
        torch.testing.assert_close(goal.distance(its_s, given).float(), plain)


def test_weights_for_uneven_timesteps_alone() -> None:
    predicted, wanted = outputs(2)
    own = torch.tensor([0.5, 3.0])
    goal, s = objective(divergence="kl"), squares(predicted, wanted).mean(1) / 4
    found, _, its_s = goal.erased(predicted.requires_grad_(), wanted, batch(timestep_weight=own))
    assert found.item() == pytest.approx((own * s).mean().item(), rel=1e-5)
    losses = goal.losses(its_s, batch(timestep_weight=own))
    torch.testing.assert_close(losses, s / 2)
    assert not losses.requires_grad


def test_sigma_sets_itself() -> None:
    goal, (predicted, wanted) = objective(sigma="auto", s0=4.0), outputs(8)
    goal.erased(predicted, wanted, batch(8, 0))
    found = squares(predicted, wanted).mean(1) / goal.sigma**2
    assert isinstance(goal.sigma, float) and found.median().item() == pytest.approx(4.0, rel=0.2)
    assert goal.criterion.synchronize
    assert goal.kept(predicted, wanted).item() == pytest.approx(found.mean().item(), rel=1e-4)


def test_what_is_wanted_is_the_anchors_output() -> None:
    given = batch()
    found = objective().wanted(DENOISER, EXAMPLES, given)
    factors = torch.tensor([3.0, 3.0, 5.0, 7.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(found, given.noisy * factors + torch.arange(10, 14).view(-1, 1, 1, 1))


def test_negative_guidance_leads_away_from_the_target() -> None:
    given = batch()
    found = objective(negative_guidance=1.5).wanted(DENOISER, EXAMPLES, given)
    indices = torch.arange(10, 14).view(-1, 1, 1, 1)
    anchor, target = given.noisy[:2] * 3 + indices[:2], given.noisy[:2] * 2 + indices[:2]
    torch.testing.assert_close(found[:2], anchor + 1.5 * (anchor - target))
    torch.testing.assert_close(found[2:], objective().wanted(DENOISER, EXAMPLES, given)[2:])


def test_the_objective_noise_wants_the_noise_and_keeps_the_others() -> None:
    noise = torch.randn(2, *SHAPE)
    assert objective(objective="noise").wanted(DENOISER, EXAMPLES, batch(2, 0, noise=noise)) is noise
    given = batch(noise=noise)
    found = objective(objective="noise").wanted(DENOISER, EXAMPLES, given)
    assert torch.equal(found[:2], noise)
    torch.testing.assert_close(found[2:], objective().wanted(DENOISER, EXAMPLES, given)[2:])


def test_the_critic_is_the_games() -> None:
    settings = {"variational": True, "divergence": "jensen_shannon", "critic_learning_rate": 0.01, "seed": 5}
    goal, same, other = (objective(**{**settings, "seed": seed}) for seed in (5, 5, 6))
    assert goal.game is not None and same.game is not None and other.game is not None
    assert goal.game.optimizer.param_groups[0]["lr"] == 0.01
    critics = [[*one.game.critic.parameters()] for one in (goal, same, other)]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(critics[0], critics[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critics[0], critics[2], strict=True))


def test_the_critic_moves_first_and_both_values_are_standardised() -> None:
    settings = {"variational": True, "divergence": "kl", "weighting": "min_snr", "sigma": "auto"}
    mask = torch.ones(1, 3, 2)
    mask[0, 0] = 0
    goal, twin = (objective(mask, **settings) for _ in range(2))
    predicted, wanted = outputs(4, seed=3)
    predicted.requires_grad_()
    given = batch(4, 0, timestep_weight=torch.tensor([1.0, 2.0, 0.5, 1.0]))
    loss, bound, s = goal.erased(predicted, wanted, given)
    scales = goal.sigma * twin._weights(given)[1]  # type: ignore[operator]
    torch.testing.assert_close(s.float(), fk.squared_distance(predicted.detach(), wanted, scales, mask))
    assert goal.slope == pytest.approx(0.5) and goal.sigma != 1.0  # and sigma has seen the samples
    game, (omega, scale) = twin.game, twin._weights(given)
    assert game is not None
    shown = Outputs(predicted, wanted, omega, mask[None], scale)
    expected = game.critic_step(shown) / 0.5
    assert bound.item() == pytest.approx(expected.item(), rel=1e-5)
    expected = game.model_loss(shown) / 0.5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.requires_grad and not bound.requires_grad
    other = objective(mask, **settings)
    assert other.teach(predicted, wanted, given).item() == pytest.approx(bound.item(), rel=1e-5)
    assert int(other.criterion.calls) == 0 and int(goal.criterion.calls) == 1
