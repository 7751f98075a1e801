"""The losses as modules, with their settings fixed at construction."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fdu_kernels.catalogue import Divergence, get_divergence
from fdu_kernels.checks import REDUCTIONS, check_choice
from fdu_kernels.functional import (
    DISTANCES,
    density_ratio_divergence,
    gaussian_divergence,
    squared_distance,
    variational_divergence,
    variational_model_loss,
)


class GaussianDivergenceLoss(nn.Module):
    """:func:`gaussian_divergence` as a module; with ``sigma="auto"`` it finds the scale of the error itself.

    The divergences differ only where s is of order 1: at a small s each is a multiple of mse, at a large s they
    saturate or explode. With "auto", the first ``calibration_calls`` calls in training mode set sigma^2 to the median
    over calls of the median |pred - target|^2 over samples, divided by ``s0``, so that the median s starts at s0; from
    then on sigma stays. It lives in buffers: a state_dict resumes it exactly, without waiting for a device.
    """

    medians: Tensor
    fixed_sigma: Tensor

    def __init__(
        self,
        divergence: str | Divergence = "squared_hellinger",
        *,
        sigma: float | Literal["auto"] = 1.0,
        s0: float = 1.0,
        calibration_calls: int = 8,
        distance: str = "mean",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        """Fix the settings.

        Args:
            divergence, distance, reduction, backend: as for :func:`gaussian_divergence`.
            sigma: a number > 0 in units of ``pred``, or "auto".
            s0: with "auto", the median of s at the start, > 0.
            calibration_calls: with "auto", how many calls set sigma, >= 1.
        """
        super().__init__()
        self.divergence = get_divergence(divergence)
        if sigma != "auto" and not (_is_number(sigma) and sigma > 0):
            raise ValueError(f"sigma must be a finite number > 0 or 'auto', got {sigma!r}")
        if not (_is_number(s0) and s0 > 0):
            raise ValueError(f"s0 must be a finite number > 0, got {s0!r}")
        if not isinstance(calibration_calls, int) or calibration_calls < 1:
            raise ValueError(f"calibration_calls must be a whole number >= 1, got {calibration_calls!r}")
        check_choice("distance", distance, DISTANCES)
        check_choice("reduction", reduction, REDUCTIONS)
        self.automatic = sigma == "auto"
        self.s0, self.distance, self.reduction, self.backend = s0, distance, reduction, backend
        # NaN marks a call that has not come yet. float64 buffers would not move to every device.
        self.register_buffer("medians", torch.full((calibration_calls if self.automatic else 0,), math.nan))
        self.register_buffer("fixed_sigma", torch.tensor(1.0 if sigma == "auto" else float(sigma)), persistent=False)

    @property
    def sigma(self) -> Tensor:
        """The sigma in force, a scalar in units of ``pred``; 1 with "auto" before the first call."""
        if not self.automatic:
            return self.fixed_sigma
        sigma = torch.sqrt(torch.nanmedian(self.medians) / self.s0)
        return torch.where(torch.isnan(sigma), self.fixed_sigma, sigma)

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss; shapes as for :func:`gaussian_divergence`."""
        if self.automatic and self.training:
            self._calibrate(pred, target, mask)
        return gaussian_divergence(
            pred,
            target,
            self.divergence,
            sigma=self.sigma,
            weight=weight,
            mask=mask,
            distance=self.distance,
            reduction=self.reduction,
            backend=self.backend,
        )

    @torch.no_grad()
    def _calibrate(self, pred: Tensor, target: Tensor, mask: Tensor | None) -> None:
        """Note the median of this call in the first free place, if there is one."""
        distances = squared_distance(pred, target, mask=mask, distance=self.distance)
        # A distance of 0, an empty mask say, tells nothing about the scale.
        median = torch.where(distances > 0, distances, math.nan).nanmedian().to(self.medians)
        free = torch.isnan(self.medians)
        first = free & (torch.cumsum(free, 0) == 1)
        self.medians.copy_(torch.where(first & torch.isfinite(median), median, self.medians))

    def extra_repr(self) -> str:
        sigma = f"'auto', s0={self.s0:g}" if self.automatic else f"{self.fixed_sigma.item():g}"
        return f"{self.divergence.key!r}, sigma={sigma}, distance={self.distance!r}, reduction={self.reduction!r}"


class VariationalDivergenceLoss(nn.Module):
    """:func:`variational_divergence`: the bound that a critic maximises, and the model's part of it."""

    def __init__(
        self,
        divergence: str | Divergence = "jensen_shannon",
        *,
        parametrization: str = "log_ratio",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        """Fix the settings, as for :func:`variational_divergence`."""
        super().__init__()
        self.divergence = get_divergence(divergence)
        self.divergence.terms(parametrization)
        check_choice("reduction", reduction, REDUCTIONS)
        self.parametrization, self.reduction, self.backend = parametrization, reduction, backend

    def forward(self, log_ratio_p: Tensor, log_ratio_q: Tensor, mask: Tensor | None = None) -> Tensor:
        """The bound E_p[A] - E_q[B]; a critic's loss is its negative."""
        return variational_divergence(log_ratio_p, log_ratio_q, self.divergence, mask=mask, **self._settings())

    def model_loss(self, log_ratio_q: Tensor, mask: Tensor | None = None) -> Tensor:
        """-E_q[B], which the model minimises."""
        return variational_model_loss(log_ratio_q, self.divergence, mask=mask, **self._settings())

    def _settings(self) -> dict[str, str | None]:
        return {"parametrization": self.parametrization, "reduction": self.reduction, "backend": self.backend}

    def extra_repr(self) -> str:
        return f"{self.divergence.key!r}, parametrization={self.parametrization!r}, reduction={self.reduction!r}"


class DensityRatioDivergenceLoss(nn.Module):
    """:func:`density_ratio_divergence` as a module."""

    def __init__(
        self,
        divergence: str | Divergence = "kl",
        *,
        samples_from: str = "q",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        """Fix the settings, as for :func:`density_ratio_divergence`."""
        super().__init__()
        self.divergence = get_divergence(divergence)
        self.divergence.terms()
        check_choice("samples_from", samples_from, ("q", "p"))
        check_choice("reduction", reduction, REDUCTIONS)
        self.samples_from, self.reduction, self.backend = samples_from, reduction, backend

    def forward(self, log_ratio: Tensor, weight: Tensor | None = None) -> Tensor:
        """The estimate from log ratios [B, ...] and weights [B]."""
        return density_ratio_divergence(
            log_ratio,
            self.divergence,
            samples_from=self.samples_from,
            weight=weight,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.divergence.key!r}, samples_from={self.samples_from!r}, reduction={self.reduction!r}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
