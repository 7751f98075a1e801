"""Sampling of the timesteps: uniform, or more often where the loss is large."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 20
"""Neighbouring timesteps are alike: the loss is known by bins of the grid."""
DECAY = 0.98
"""What a loss still counts one observation later: the last 50 or so make the estimate."""
UNIFORM_SHARE = 0.2
"""Share of the samples drawn alike, which bounds the weights by 1 / UNIFORM_SHARE."""
LARGEST = 1e15
"""Losses above count as this much, so that sums of their squares fit float32; chi-square reaches 1e27."""
REFRESH_EVERY = 10
"""Draws between looks at the losses, each of which waits for the device."""


class TimestepSampler:
    """Draws indices of a denoiser's grid, with weights that keep the mean of the loss what it is for uniform draws.

    "uniform": all timesteps equally often.

    "importance": a bin of the grid is drawn in proportion to the root of its mean squared loss, which makes the
    weighted loss vary least (Nichol and Dhariwal 2021, arXiv 2102.09672, section 3.3), with moving averages over bins
    instead of a history of every timestep, because an erasure is short. What is drawn depends on the generator and the
    losses observed alone: ranks that are all shown the losses of all ranks keep the same probabilities.

    Args:
        sampling: "uniform" or "importance".
        timesteps: T, the length of the grid.
    """

    def __init__(self, sampling: str, timesteps: int) -> None:
        self.sampling, self.timesteps = sampling, timesteps
        bins = min(BINS, timesteps)
        self.edges = torch.arange(bins + 1) * timesteps // bins
        self.uniform = self.edges.diff().double() / timesteps
        """Probability of each bin [bins] if every timestep is alike; float64."""
        self.probabilities = self.uniform
        """Probability of each bin [bins], float64."""
        # By bin: the sum of squared losses, and the number of losses in it.
        self._observed = torch.zeros(2, bins)
        self._draws = 0

    @property
    def adapts(self) -> bool:
        """Whether it wants to observe the losses."""
        return self.sampling == "importance"

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """``count`` indices, int64 [N], and the weights of their losses, float32 [N] or None for all 1; on the CPU."""
        if not self.adapts:
            return torch.randint(self.timesteps, (count,), generator=generator), None
        if self._draws % REFRESH_EVERY == 0:
            self._refresh()
        self._draws += 1
        bins = torch.multinomial(self.probabilities, count, replacement=True, generator=generator)
        within = torch.rand(count, generator=generator, dtype=torch.float64) * self.edges.diff()[bins]
        return self.edges[bins] + within.long(), (self.uniform / self.probabilities)[bins].float()

    @torch.no_grad()
    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Take note of losses [N], without their weights, at indices [N]; the device never makes the host wait.

        Losses that are not finite do not count.
        """
        self._observed = self._observed.to(losses.device)
        edges = self.edges.to(losses.device, non_blocking=True)
        losses = losses.float()
        # A sum a bin: scattered sums would come out differently on every run.
        inside = (indices >= edges[:-1, None]) & (indices < edges[1:, None]) & torch.isfinite(losses)
        squares = torch.where(inside, losses.clamp(max=LARGEST).square(), 0.0).sum(1)
        self._observed = DECAY * self._observed + torch.stack([squares, inside.sum(1).float()])

    def _refresh(self) -> None:
        squares, counts = self._observed.double().cpu()
        if not squares.sum() > 0:
            return
        # A bin not seen yet is taken for an average one.
        mean_square = torch.where(counts > 0, squares / counts, squares.sum() / counts.sum())
        wanted = self.uniform * torch.sqrt(mean_square)
        self.probabilities = (1 - UNIFORM_SHARE) * wanted / wanted.sum() + UNIFORM_SHARE * self.uniform

    def state_dict(self) -> dict[str, Tensor]:
        """What continues the draws exactly, together with the generator's state."""
        return {
            "observed": self._observed.clone(),
            "probabilities": self.probabilities.clone(),
            "draws": torch.tensor(self._draws),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`."""
        self._observed = state["observed"].clone()
        self.probabilities = state["probabilities"].cpu().clone()
        self._draws = int(state["draws"])
