"""Timesteps: how often each is drawn, and how much it counts in the loss.

A weighting is two tables over the denoiser's grid. With x_t = a x_0 + b epsilon (a = signal, b = noise) and
SNR = (a/b)^2, a change d of the denoiser's output means, at one x_t, the change e d of epsilon and g d of x_0 in
magnitude, e = (a/b) g:

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
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from fdu.models.denoiser import PredictionType

BINS = 20
"""Bins of the grid; neighbouring timesteps have similar losses."""
DENSITIES, SCHEME_WEIGHTS = ("logit_normal", "mode"), ("sigma_sqrt", "cosmap")
"""The values of weighting_scheme that draw timesteps, and those that weigh the loss."""
DECAY = 0.98
"""Factor on the weight of a loss per observation; about the last 50 make the estimate."""
UNIFORM_SHARE = 0.2
"""Share of the samples drawn uniformly, which bounds the weights by 1 / UNIFORM_SHARE."""
LARGEST = 1e15
"""Upper bound on a loss, so that sums of squares fit float32; chi-square reaches 1e27."""
REFRESH_EVERY = 10
"""Draws between reads of the losses; each read waits for the device."""


class TimestepSampler:
    """Draws indices of a denoiser's grid, with weights that keep the expected loss of uniform draws.

    "uniform" draws all timesteps equally often. "importance" draws a bin of the grid in proportion to the root of its
    mean squared loss, which minimises the variance of the weighted loss (Nichol and Dhariwal 2021, arXiv 2102.09672,
    section 3.3). An erasure is short, so moving averages over bins replace a history of every timestep. Draws depend
    only on the generator and the observed losses: processes that observe the losses of all keep the same probabilities.

    "logit_normal" and "mode" draw by the densities of Esser et al. 2024 (arXiv 2403.03206), section 3.1, as diffusers
    does; nothing makes up for that.

    Args:
        sampling: "uniform", "importance" or one of ``DENSITIES``.
        timesteps: T, the length of the grid.
        shape: the parameters of the densities by diffusers' names: logit_mean, logit_std, mode_scale.
    """

    def __init__(self, sampling: str, timesteps: int, **shape: float) -> None:
        self.sampling, self.timesteps, self.shape = sampling, timesteps, shape
        bins = min(BINS, timesteps)
        self.edges = torch.arange(bins + 1) * timesteps // bins
        self.uniform = self.edges.diff().double() / timesteps
        """Probability of each bin [bins] for uniform timesteps, float64."""
        self.probabilities = self.uniform
        """Probability of each bin [bins], float64."""
        # By bin: the sum of squared losses, and the number of losses in it.
        self._observed = torch.zeros(2, bins)
        self._edges = self.edges  # on the device of the losses
        self._draws = 0

    @property
    def adapts(self) -> bool:
        """Whether it wants to observe the losses."""
        return self.sampling == "importance"

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """``count`` indices, int64 [N], and the weights of their losses, float32 [N] or None for all 1; on the CPU."""
        if self.sampling in DENSITIES:
            drawn = compute_density_for_timestep_sampling(self.sampling, count, generator=generator, **self.shape)
            # There, 0 is the noisiest timestep.
            return self.timesteps - 1 - (drawn * self.timesteps).long().clamp(0, self.timesteps - 1), None
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
        """Note losses [N], without weights, at indices [N], without waiting for the device; only finite ones count."""
        self._observed, self._edges = self._observed.to(losses.device), self._edges.to(losses.device)
        edges, losses = self._edges, losses.float()
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
        """The state to continue the draws exactly, together with the generator's."""
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

    "posterior": h(s) is the divergence of the Gaussians p(x_{t-1} | x_t) of the two outputs. The means of the DDPM
    posterior differ by sqrt(abar_{t-1}) beta_t / (1 - abar_t) g d. The square over the posterior's variance, beta_t
    (1 - abar_{t-1}) / (1 - abar_t), is s = (SNR_{t-1} - SNR_t) g^2 |d|^2 (Kingma et al. 2021, arXiv 2107.00630). This
    variance is the default of diffusers' DDPM sampler, and the sum of SNR_{t-1} - SNR_t hardly depends on the step of
    the grid. It vanishes at the first step, which takes that of the second (Ho et al. 2020, arXiv 2006.11239). s is
    divided by its median over the grid, so that sigma keeps its meaning for a typical timestep; the first few steps
    would dominate the mean.

    "min_snr": omega = min(SNR, snr_gamma) g^2 weighs the error of x_0 (Hang et al. 2023, arXiv 2303.09556).
    "p2": omega = e^2 / (1 + SNR) weighs the error of epsilon (Choi et al. 2022, arXiv 2204.00227, k = gamma = 1).
    Both are divided by their mean over the grid, so that the learning rate keeps its meaning.

    Args:
        weighting: one of the above.
        signal, noise: [T], T >= 2, noisiest last: signal >= 0, noise > 0. If the last signal is 0, the output epsilon
            says nothing about x_0 there, and "posterior" repeats the value of the timestep before.
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


def scheme_weights(weighting_scheme: str, sigmas: Tensor) -> Weighting:
    """diffusers' weights of the loss in rectified flow, divided by their mean over the grid.

    Args:
        weighting_scheme: one of ``SCHEME_WEIGHTS``.
        sigmas: sigma > 0 on the grid, [T].
    """
    omega = compute_loss_weighting_for_sd3(weighting_scheme, sigmas.double())
    return Weighting((omega / omega.mean()).float(), torch.ones_like(sigmas, dtype=torch.float32))


def _of_sample(a: Tensor, b: Tensor, prediction_type: PredictionType) -> Tensor:
    """g: how far x_0 moves if the output moves by 1; infinite for epsilon without a signal."""
    gains = {"epsilon": b / a, "v_prediction": b / (a.square() + b.square()), "sample": torch.ones_like(a)}
    return gains.get(prediction_type, b / (a + b))


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
