"""The losses as modules, and the scale sigma that sets itself from the first calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fdu_kernels import checks, functional
from fdu_kernels.catalogue import get_divergence
from fdu_kernels.critic import critic_terms
from fdu_kernels.divergence import Divergence

CALIBRATION_SAMPLES = 1024
"""sigma="auto" takes the median of at most so many samples, the latest of the calibration calls."""


class GaussianDivergenceLoss(nn.Module):
    """:func:`fdu_kernels.gaussian_divergence` as a module.

    With sigma="auto" the first ``calibration_calls`` calls in training mode set sigma^2 so that the median of s over
    all their samples is s0; then sigma stays. Samples at distance 0 (an empty mask row, equal outputs) and
    non-finite ones do not count, and before there is any other sigma is 1. The state is in buffers: a state_dict
    resumes it exactly, and the device never makes the host wait. Under DDP each rank calibrates on its own samples.

    Args:
        divergence: a name ("squared_hellinger", "alpha:0.3", ...) or a Divergence.
        sigma: a positive number, or "auto".
        s0: the median of s that "auto" aims at, > 0.
        calibration_calls: for how many calls "auto" looks. 8 calls of one sample already place the median of a
            chi-square-like s within some 20 % of the truth, and a drift in training afterwards is left to be seen.
        distance, reduction, backend: as in the function.
    """

    sigma: Tensor
    calls: Tensor
    observed: Tensor

    def __init__(
        self,
        divergence: str | Divergence = "squared_hellinger",
        sigma: float | str = 1.0,
        s0: float = 1.0,
        calibration_calls: int = 8,
        distance: str = "mean",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.divergence = get_divergence(divergence)
        self.auto = sigma == "auto"
        if isinstance(sigma, str):
            checks.check_choice("sigma", sigma, ("auto",))
            sigma = 1.0
        elif isinstance(sigma, Tensor):
            raise TypeError('sigma of the module must be a number or "auto"; pass a tensor [B] to gaussian_divergence')
        checks.check_sigma(sigma, torch.empty(1))
        if not s0 > 0:
            raise ValueError(f"s0 must be positive, not {s0!r}; it is the median of s that sigma='auto' aims at")
        if calibration_calls < 1:
            raise ValueError(f"calibration_calls must be at least 1, not {calibration_calls!r}")
        checks.check_choice("distance", distance, functional.DISTANCES)
        checks.check_choice("reduction", reduction, functional.REDUCTIONS)
        self.s0 = float(s0)
        self.calibration_calls = calibration_calls
        self.distance = distance
        self.reduction = reduction
        self.backend = backend
        self.register_buffer("sigma", torch.tensor(float(sigma)), persistent=self.auto)
        if self.auto:
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("observed", torch.full((CALIBRATION_SAMPLES,), torch.inf))
            # The count is kept twice: reading the buffer at every call would make the host wait.
            self._calls = 0
            self.register_load_state_dict_post_hook(_read_calls)

    def forward(self, pred: Tensor, target: Tensor, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The loss of [B, ...] denoiser outputs; ``target`` is a constant."""
        if self.auto and self.training and self._calls < self.calibration_calls:
            self._calibrate(pred, target, mask)
        return functional.gaussian_divergence(
            pred, target, self.divergence, self.sigma, weight, mask, self.distance, self.reduction, self.backend
        )

    @torch.no_grad()
    def _calibrate(self, pred: Tensor, target: Tensor, mask: Tensor | None) -> None:
        distances = functional.squared_distance(pred, target, mask=mask, distance=self.distance).to(self.observed.dtype)
        counts = torch.isfinite(distances) & (distances > 0)
        # What does not count is inf, and so are the free places: the sort moves all of them behind the samples.
        pool = torch.cat([torch.where(counts, distances, torch.inf), self.observed]).sort(stable=True).values
        self.observed.copy_(pool[:CALIBRATION_SAMPLES])
        samples = torch.isfinite(self.observed).sum()
        middle = torch.stack([(samples - 1).clamp(min=0) // 2, samples // 2])
        median = self.observed[middle].mean()
        self.sigma.copy_(torch.where(samples > 0, torch.sqrt(median / self.s0), self.sigma))
        self._calls += 1
        self.calls.add_(1)

    def extra_repr(self) -> str:
        scale = f'sigma="auto", s0={self.s0:g}, calibration_calls={self.calibration_calls}' if self.auto else None
        return ", ".join(
            [
                repr(str(self.divergence)),
                scale or f"sigma={float(self.sigma):g}",
                f"distance={self.distance!r}",
                f"reduction={self.reduction!r}",
            ]
        )


def _read_calls(module: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(module, GaussianDivergenceLoss):
        module._calls = int(module.calls)


class VariationalDivergenceLoss(nn.Module):
    """The two losses of the variational game: the critic minimises ``forward``, the model ``model_loss``.

    ``forward`` is minus :func:`fdu_kernels.variational_divergence`, so that both are minimised by an optimizer.
    """

    def __init__(
        self,
        divergence: str | Divergence = "jensen_shannon",
        parametrization: str = "log_ratio",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.divergence = get_divergence(divergence)
        critic_terms(self.divergence, parametrization)
        checks.check_choice("reduction", reduction, functional.REDUCTIONS)
        self.parametrization = parametrization
        self.reduction = reduction
        self.backend = backend

    def forward(self, log_ratio_p: Tensor, log_ratio_q: Tensor, mask: Tensor | None = None) -> Tensor:
        """-(E_p[A(v)] - E_q[B(v)]), what the critic minimises."""
        return -functional.variational_divergence(
            log_ratio_p, log_ratio_q, self.divergence, mask, self.parametrization, self.reduction, self.backend
        )

    def model_loss(self, log_ratio_q: Tensor, mask: Tensor | None = None) -> Tensor:
        """-E_q[B(v)], what the model minimises."""
        return functional.variational_model_loss(
            log_ratio_q, self.divergence, mask, self.parametrization, self.reduction, self.backend
        )

    def extra_repr(self) -> str:
        return f"{str(self.divergence)!r}, parametrization={self.parametrization!r}, reduction={self.reduction!r}"


class DensityRatioDivergenceLoss(nn.Module):
    """:func:`fdu_kernels.density_ratio_divergence` as a module."""

    def __init__(
        self,
        divergence: str | Divergence = "kl",
        samples_from: str = "q",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.divergence = get_divergence(divergence)
        critic_terms(self.divergence, "log_ratio")
        checks.check_choice("samples_from", samples_from, ("q", "p"))
        checks.check_choice("reduction", reduction, functional.REDUCTIONS)
        self.samples_from = samples_from
        self.reduction = reduction
        self.backend = backend

    def forward(self, log_ratio: Tensor, weight: Tensor | None = None) -> Tensor:
        """The estimate from log density ratios [B, ...]."""
        return functional.density_ratio_divergence(
            log_ratio, self.divergence, self.samples_from, weight, self.reduction, self.backend
        )

    def extra_repr(self) -> str:
        return f"{str(self.divergence)!r}, samples_from={self.samples_from!r}, reduction={self.reduction!r}"
