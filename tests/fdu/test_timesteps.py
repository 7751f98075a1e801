"""Timesteps: sampling without a bias and exact resumption; weightings against diffusers and Gaussians in full."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

import fdu_kernels as fk
from fdu.config import EraseConfig
from fdu.models.denoiser import PredictionType
from fdu.training.timesteps import REFRESH_EVERY, UNIFORM_SHARE, TimestepSampler, scheme_weights, weights

PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample", "flow")
WEIGHTINGS = get_args(get_type_hints(EraseConfig)["weighting"])
STEPS = 50


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_at(indices: Tensor) -> Tensor:
    """Large at the clean end, some noise."""
    return torch.exp(-indices / 100) + 0.01 * (1 + torch.sin(indices.float()))


def trained(steps: int = 200, timesteps: int = 1000) -> TimestepSampler:
    sampler, draws = TimestepSampler("importance", timesteps), generator()
    for _ in range(steps):
        indices, _ = sampler.draw(16, draws)
        sampler.observe(indices, loss_at(indices))
    return sampler


def test_uniform_is_randint() -> None:
    indices, weights = TimestepSampler("uniform", 1000).draw(64, generator())
    assert torch.equal(indices, torch.randint(1000, (64,), generator=generator()))
    assert weights is None


@pytest.mark.parametrize("timesteps", [1, 3, 1000, 1009])
def test_importance_starts_alike(timesteps: int) -> None:
    indices, weights = TimestepSampler("importance", timesteps).draw(20_000, generator())
    assert weights is not None and torch.equal(weights, torch.ones(20_000))
    assert indices.min() == 0 and indices.max() == timesteps - 1
    assert indices.double().mean().item() == pytest.approx((timesteps - 1) / 2, abs=0.01 * timesteps)


@pytest.mark.parametrize("timesteps", [1000, 1009])
def test_importance_draws_by_the_root_mean_square_of_the_loss(timesteps: int) -> None:
    sampler = trained(timesteps=timesteps)
    losses = loss_at(torch.arange(timesteps)).double()
    means = torch.stack(
        [losses[one:other].square().mean().sqrt() for one, other in sampler.edges.unfold(0, 2, 1).tolist()]
    )
    expected = sampler.uniform * means / (sampler.uniform * means).sum()
    expected = (1 - UNIFORM_SHARE) * expected + UNIFORM_SHARE * sampler.uniform
    torch.testing.assert_close(sampler.probabilities, expected, rtol=0.25, atol=0)
    assert sampler.probabilities[0] > 10 * sampler.probabilities[-1]


def test_weights_keep_the_mean_and_lower_its_variance() -> None:
    sampler = trained()
    indices, weights = sampler.draw(50_000, generator(1))
    assert weights is not None
    weighted = weights * loss_at(indices)
    plain = loss_at(torch.arange(1000))
    assert weighted.mean().item() == pytest.approx(plain.mean().item(), rel=0.01)
    assert weights.mean().item() == pytest.approx(1, rel=0.03)
    assert weighted.var() < plain.var() / 10
    assert weights.max() < 1 / UNIFORM_SHARE


def test_the_loss_is_looked_at_now_and_then() -> None:
    sampler, draws = TimestepSampler("importance", 1000), generator()
    changes = []
    for _ in range(2 * REFRESH_EVERY + 1):
        before = sampler.probabilities
        indices, _ = sampler.draw(16, draws)
        changes.append(not torch.equal(sampler.probabilities, before))
        sampler.observe(indices, loss_at(indices))
    assert [step for step, changed in enumerate(changes) if changed] == [REFRESH_EVERY, 2 * REFRESH_EVERY]


def test_observing_reads_nothing_from_the_device() -> None:
    # A meta tensor has no values to read.
    sampler = TimestepSampler("importance", 1000)
    sampler.observe(torch.zeros(4, dtype=torch.int64, device="meta"), torch.zeros(4, device="meta"))


def test_the_order_of_ranks_does_not_matter_and_losses_may_be_half() -> None:
    samplers = []
    for _ in range(2):
        sampler = TimestepSampler("importance", 1000)
        indices = torch.arange(0, 1000, 10)
        sampler.observe(indices, loss_at(indices).half())
        sampler.draw(1, generator())
        samplers.append(sampler)
    assert torch.equal(samplers[0].probabilities, samplers[1].probabilities)
    assert not torch.equal(samplers[0].probabilities, samplers[0].uniform)


@pytest.mark.parametrize("at", [7, REFRESH_EVERY])
def test_draws_resume_exactly(at: int) -> None:
    def step(sampler: TimestepSampler, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        indices, weights = sampler.draw(16, draws)
        assert weights is not None
        sampler.observe(indices, loss_at(indices))
        return indices, weights

    whole, draws = TimestepSampler("importance", 1000), generator()
    for _ in range(at):
        step(whole, draws)
    resumed, other_draws = TimestepSampler("importance", 1000), generator()
    resumed.load_state_dict(whole.state_dict())
    other_draws.set_state(draws.get_state())
    for _ in range(3 * REFRESH_EVERY):
        one, other = step(whole, draws), step(resumed, other_draws)
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_do_not_count(value: float) -> None:
    sampler = trained()
    before = sampler.state_dict()["observed"].clone()
    sampler.observe(torch.tensor([5]), torch.tensor([value]))
    assert torch.equal(sampler.state_dict()["observed"].sign(), before.sign())
    sampler.draw(16, generator())
    assert torch.isfinite(sampler.probabilities).all()


def test_losses_of_any_size_leave_probabilities() -> None:
    sampler = TimestepSampler("importance", 1000)
    for largest in (1e-30, 1.0, 1e27, 3e38):
        sampler.observe(torch.tensor([5, 500, 501]), torch.tensor([largest, 0.1, 0.0]))
        sampler.load_state_dict({**sampler.state_dict(), "draws": torch.tensor(0)})
        sampler.draw(16, generator())
        assert torch.isfinite(sampler.probabilities).all() and sampler.probabilities.min() > 0
        assert sampler.probabilities.sum().item() == pytest.approx(1)


def test_losses_of_zero_leave_it_alike() -> None:
    sampler = TimestepSampler("importance", 1000)
    sampler.observe(torch.arange(1000), torch.zeros(1000))
    _, weights = sampler.draw(4, generator())
    assert weights is not None and torch.equal(weights, torch.ones(4))


# Weightings


def diffusion(prediction: str = "epsilon", **settings: bool) -> tuple[DDPMScheduler, Tensor, Tensor]:
    """A DDPM scheduler in float64, and the tables of its grid."""
    scheduler = DDPMScheduler(STEPS, beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False)
    if settings:
        scheduler = DDPMScheduler.from_config(scheduler.config, **settings)
    scheduler.betas, scheduler.alphas = scheduler.betas.double(), 1 - scheduler.betas.double()
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler, scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()


def flow() -> tuple[Tensor, Tensor]:
    """A flow grid, noisiest last, at pure noise in the end."""
    sigmas = FlowMatchEulerDiscreteScheduler(STEPS, shift=3.0).sigmas[:STEPS].flip(0).double()
    assert sigmas[-1] == 1
    return 1 - sigmas, sigmas


def kl(mean: Tensor, other: Tensor, variance: Tensor | float) -> Tensor:
    return (mean - other).square().sum() / (2 * variance)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_posterior_is_the_divergence_of_the_samplers_gaussians(prediction: PredictionType) -> None:
    scheduler, signal, noise = diffusion(prediction)
    generator = torch.Generator().manual_seed(0)
    x, one, other = torch.randn(3, 1, 4, generator=generator, dtype=torch.float64)
    expected = []
    for t in range(1, STEPS):
        # Same generator, same noise: the difference of the samples is that of the means.
        previous = [
            scheduler.step(output, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
            for output in (one, other)
        ]
        expected.append(kl(*previous, scheduler._get_variance(t)))
    scale = weights("posterior", signal, noise, prediction).scale[1:].double()
    found = fk.gaussian_divergence(
        one.expand(STEPS - 1, -1), other.expand(STEPS - 1, -1), "kl", sigma=scale, distance="sum", reduction="none"
    )
    ratio = torch.stack(expected) / found
    torch.testing.assert_close(ratio, ratio[0].expand(STEPS - 1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("grid", ["diffusion", "flow"])
def test_posterior_is_the_conditional_of_the_forward_process(prediction: PredictionType, grid: str) -> None:
    # Neither schedule nor parametrisation is assumed here: x_0 by solving for it, the posterior by Bayes' rule.
    signal, noise = diffusion()[1:] if grid == "diffusion" else flow()
    scale = weights("posterior", signal, noise, prediction).scale.double()
    expected = []
    for t in range(1, STEPS - 1):
        a, b, before, noise_before = signal[t], noise[t], signal[t - 1], noise[t - 1]
        row = {"epsilon": (0, 1), "sample": (1, 0), "v_prediction": (-b, a), "flow": (-1, 1)}[prediction]
        system = torch.stack([torch.stack([a, b]), torch.tensor(row, dtype=torch.float64)])
        clean = [torch.linalg.solve(system, torch.tensor([0.7, output], dtype=torch.float64))[0] for output in (0, 1)]
        # x_t = k x_{t-1} + noise of variance v, and x_{t-1} ~ N(before x_0, noise_before^2).
        k = a / before
        v = b**2 - (k * noise_before) ** 2
        variance = 1 / (1 / noise_before**2 + k**2 / v)
        means = [variance * (before * x0 / noise_before**2 + k * 0.7 / v) for x0 in clean]
        expected.append(kl(*means, variance))
    ratio = torch.stack(expected) * scale[1:-1].square()
    torch.testing.assert_close(ratio, ratio[0].expand(STEPS - 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_typical_timestep_keeps_its_sigma_and_the_mean_weight_is_1(prediction: PredictionType) -> None:
    for signal, noise in (diffusion()[1:], flow()):
        for weighting in WEIGHTINGS:
            made = weights(weighting, signal, noise, prediction)
            assert made.omega.mean().item() == pytest.approx(1, rel=1e-6)
            assert made.scale.pow(-2).quantile(0.5).item() == pytest.approx(1, rel=1e-5)
            assert made.omega.dtype == made.scale.dtype == torch.float32


def test_the_first_step_takes_the_variance_of_the_second() -> None:
    scheduler, signal, noise = diffusion()
    x, one, other = torch.randn(3, 1, 4, dtype=torch.float64)
    expected = []
    for t in (0, 1):
        means = [
            scheduler.step(out, t, x, generator=torch.Generator().manual_seed(t)).prev_sample for out in (one, other)
        ]
        expected.append(kl(*means, scheduler._get_variance(1)))
    scale = weights("posterior", signal, noise, "epsilon").scale
    assert (scale[1] / scale[0]).square().item() == pytest.approx((expected[0] / expected[1]).item(), rel=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_last_step_of_pure_noise_is_finite(weighting: str, prediction: PredictionType) -> None:
    _, signal, noise = diffusion(rescale_betas_zero_snr=True)
    assert signal[-1] == 0
    made = weights(weighting, signal.float(), noise.float(), prediction)
    assert torch.isfinite(made.omega).all() and (made.omega >= 0).all()
    assert torch.isfinite(made.scale).all() and (made.scale > 0).all()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_that_of_diffusers_examples(gamma: float) -> None:
    scheduler, signal, noise = diffusion()
    snr = compute_snr(scheduler, torch.arange(STEPS)).double()
    bounded = torch.stack([snr, torch.full_like(snr, gamma)]).amin(0)
    for prediction, expected in (
        ("epsilon", bounded / snr),
        ("v_prediction", bounded / (snr + 1)),
        ("sample", bounded),
    ):
        omega = weights("min_snr", signal, noise, prediction, gamma).omega  # type: ignore[arg-type]
        torch.testing.assert_close(omega.double(), expected / expected.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", ["posterior", "min_snr", "p2"])
@pytest.mark.parametrize("grid", ["diffusion", "flow"])
def test_predictions_of_the_same_thing_weigh_the_same(weighting: str, grid: str) -> None:
    # A change of epsilon by 1 at one x_t, seen as a change of each prediction.
    signal, noise = diffusion()[1:] if grid == "diffusion" else flow()
    signal, noise = signal[:-1], noise[:-1]
    changes = {
        "epsilon": torch.ones_like(signal),
        "sample": noise / signal,
        "v_prediction": (signal**2 + noise**2) / signal,
        "flow": 1 + noise / signal,
    }
    losses = []
    for prediction, change in changes.items():
        made = weights(weighting, signal, noise, prediction)  # type: ignore[arg-type]
        losses.append(made.omega * change.square() / made.scale.double().square())
    for loss in losses[1:]:
        torch.testing.assert_close(loss / loss[7], losses[0] / losses[0][7], rtol=1e-5, atol=0)


def test_p2_weighs_epsilon_by_1_minus_abar() -> None:
    scheduler, signal, noise = diffusion()
    expected = 1 - scheduler.alphas_cumprod
    omega = weights("p2", signal, noise, "epsilon").omega
    torch.testing.assert_close(omega.double(), expected / expected.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": torch.tensor([0.0, 0.5, 0.9])}, "noise > 0 at every timestep"),
        ({"signal": torch.tensor([0.1, 0.5, 0.9])}, "signal / noise must fall"),
    ],
)
def test_what_is_no_grid_is_refused(changes: dict[str, object], message: str) -> None:
    settings = {
        "weighting": "posterior",
        "signal": torch.tensor([0.9, 0.5, 0.1]),
        "noise": torch.tensor([0.1, 0.5, 0.9]),
        "prediction_type": "epsilon",
    }
    with pytest.raises(ValueError, match=message):
        weights(**{**settings, **changes})  # type: ignore[arg-type]


def noise_levels(sampling: str, **shape: float) -> Tensor:
    """How noisy many drawn timesteps are, from 0 to 1."""
    indices, weights = TimestepSampler(sampling, 1000, **shape).draw(20_000, generator())
    assert weights is None and 0 <= indices.min() and indices.max() < 1000
    return indices / 1000


def test_the_densities_are_those_of_diffusers() -> None:
    """Esser et al. 2024: a logit-normal timestep, and one around the middle; u = 0 is the noisiest in diffusers."""
    logits = torch.logit(noise_levels("logit_normal", logit_mean=-1.0, logit_std=0.5) + 5e-4)
    assert float(logits.mean()) == pytest.approx(1.0, abs=0.02) and float(logits.std()) == pytest.approx(0.5, abs=0.02)
    u = torch.rand(20_000, generator=generator(), dtype=torch.float64)
    wanted = u + 1.29 * (torch.cos(math.pi * u / 2).square() - 1 + u)
    levels = noise_levels("mode", mode_scale=1.29).double()
    quantiles = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    assert torch.allclose(levels.quantile(quantiles), wanted.quantile(quantiles), atol=0.02)


def test_the_weights_of_a_scheme_are_those_of_diffusers_with_a_mean_of_one() -> None:
    sigmas = torch.linspace(0.1, 1.0, 10)
    steep, round_ = (scheme_weights(name, sigmas) for name in ("sigma_sqrt", "cosmap"))
    for one in (steep, round_):
        assert float(one.omega.mean()) == pytest.approx(1.0) and one.scale.tolist() == [1.0] * 10
    assert torch.allclose(steep.omega[0] / steep.omega[-1], torch.tensor(100.0))
    # 2 / (pi (1 - 2 sigma + 2 sigma^2)): twice as much in the middle as at the end.
    assert torch.allclose(round_.omega[4] / round_.omega[-1], torch.tensor(2.0))
