"""Timesteps: uniform as ever, or by importance without a bias, the same everywhere and after resuming."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fdu.training.timesteps import REFRESH_EVERY, UNIFORM_SHARE, TimestepSampler


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
