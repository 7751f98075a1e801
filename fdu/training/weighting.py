"""Weights of the timesteps in the loss, as two tables over the denoiser's grid.

With x_t = a x_0 + b epsilon (a = signal, b = noise) and SNR = (a/b)^2, a change d of the denoiser's output means, at
one x_t, the change e d of epsilon and g d of x_0 in magnitude, e = (a/b) g:

    prediction    g                    e
    epsilon       b/a                  1
    v_prediction  b/(a^2 + b^2)        a/(a^2 + b^2)      since v = a epsilon - b x_0
    sample        1                    a/b
    flow          b/(a + b)            a/(a + b)          since the output is epsilon - x_0

(a^2 + b^2 = 1 in diffusion, a + b = 1 in rectified flow). Only SNR, e and g occur below, and SNR is not changed by
scaling x_t, so one formula serves every schedule.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fdu.models.denoiser import PredictionType


@dataclasses.dataclass(frozen=True)
class Weighting:
    """loss_b = omega_b h(s_b) with s_b = |pred_b - target_b|^2 / (sigma scale_b)^2, by index of the grid."""

    omega: Tensor
    """Weights >= 0, float32 [T], of mean 1."""
    scale: Tensor
    """Relative standard deviations > 0, float32 [T], of median 1."""

    def to(self, device: torch.device) -> Weighting:
        """The same tables there."""
        return Weighting(self.omega.to(device), self.scale.to(device))


def weights(
    weighting: str, signal: Tensor, noise: Tensor, prediction_type: PredictionType, snr_gamma: float = 5.0
) -> Weighting:
    """The tables of a weighting.

    "unit": all timesteps equal, as in the code of Novello et al. 2026 (arXiv 2509.21167).

    "posterior": h(s) is the divergence of the Gaussians p(x_{t-1} | x_t) that the two outputs stand for. The means
    of the DDPM posterior differ by sqrt(abar_{t-1}) beta_t / (1 - abar_t) g d. Divided by its variance, beta_t
    (1 - abar_{t-1}) / (1 - abar_t), this is s = (SNR_{t-1} - SNR_t) g^2 |d|^2 (Kingma et al. 2021, arXiv 2107.00630),
    or in the usual terms beta_t^2 / (alpha_t (1 - abar_t) sigma_t^2) e^2 |d|^2. That variance, not beta_t, because it
    is what diffusers' DDPM sampler uses by default, and because the sum of SNR_{t-1} - SNR_t over the grid hardly
    depends on how fine the grid is. It vanishes at the first step, which takes that of the second, as Ho et al. 2020
    (arXiv 2006.11239) do. Divided by its median over the grid, so that sigma keeps the meaning that it has for a
    typical timestep with "unit"; the mean would be that of the first few steps, which exceed all others by far.

    "min_snr": omega = min(SNR, snr_gamma) g^2, which weighs the error of x_0 (Hang et al. 2023, arXiv 2303.09556).
    "p2": omega = e^2 / (1 + SNR), which weighs the error of epsilon (Choi et al. 2022, arXiv 2204.00227, with
    k = gamma = 1). Both divided by their mean over the grid, so that the learning rate keeps its
    meaning.

    Args:
        weighting: one of the above.
        signal, noise: [T], T >= 2, of a grid that is noisiest last: signal >= 0, noise > 0. The signal of the last
            timestep may be 0; with "epsilon", whose output then says nothing of x_0, "posterior" gives the last
            timestep what the one before it has.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        snr_gamma: bound of the SNR in "min_snr", > 0.

    Raises:
        ValueError: a grid that is not as above.
    """
    ones = torch.ones_like(signal, dtype=torch.float32)
    if weighting == "unit":
        return Weighting(ones, ones)
    a, b = signal.double(), noise.double()
    _check_grid(a, b)
    snr = (a / b).square()
    g = _of_sample(a, b, prediction_type)
    if weighting == "posterior":
        precision = _posterior_precision(snr, g)
        return Weighting(ones, torch.sqrt(precision.quantile(0.5) / precision).float())
    if weighting == "min_snr":
        # For epsilon without a signal, min(SNR, gamma) g^2 = min(SNR, gamma) / SNR is 0 / 0.
        omega = torch.where(a > 0, snr.clamp(max=snr_gamma) * g.square(), 1.0 if prediction_type == "epsilon" else 0.0)
    else:
        e = torch.ones_like(a) if prediction_type == "epsilon" else (a / b) * g
        omega = e.square() / (1 + snr)
    return Weighting((omega / omega.mean()).float(), ones)


def _of_sample(a: Tensor, b: Tensor, prediction_type: PredictionType) -> Tensor:
    """g: how far x_0 moves if the output does by 1; infinite for epsilon without a signal."""
    if prediction_type == "epsilon":
        return b / a
    if prediction_type == "v_prediction":
        return b / (a.square() + b.square())
    if prediction_type == "sample":
        return torch.ones_like(a)
    return b / (a + b)


def _posterior_precision(snr: Tensor, g: Tensor) -> Tensor:
    """s / |d|^2: the squared difference of the posterior's means over its variance, for a change of the output by 1."""
    # SNR_{t-1} - SNR_t for every step but the first. There abar_{t-1} = 1 and beta_t = 1 - abar_t: the means differ by
    # g |d|, and the variance is that of the second step.
    abar = snr / (1 + snr)
    second_variance = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1])
    precision = torch.cat([1 / second_variance[None], snr[:-1] - snr[1:]]) * g.square()
    if torch.isinf(precision[-1]):
        precision[-1] = precision[-2]
    return precision


def _check_grid(signal: Tensor, noise: Tensor) -> None:
    if not bool(((noise > 0) & (signal >= 0)).all()):
        raise ValueError("signal must be >= 0 and noise > 0 at every timestep; leave x_0 itself out of the grid")
    if not bool((torch.diff(signal / noise) < 0).all()):
        raise ValueError("signal / noise must fall from each timestep to the next; sort the grid, noisiest last")
