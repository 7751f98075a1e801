"""The losses of a batch: the divergence from the training target, and the preservation loss."""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import fdu_kernels
from fdu.config import SNR_GAMMA, EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.models.staging import to_device
from fdu.training.critic import Outputs, VariationalGame
from fdu.training.examples import Batch, Examples
from fdu.training.timesteps import SCHEME_WEIGHTS, scheme_weights, weights


class Objective(nn.Module):
    """Every objective there is, as the settings choose.

    Args:
        denoiser: whose outputs are compared.
        config: the settings.
        mask: weight of each pixel of a latent, [1, H, W], >= 0; None for 1.
    """

    def __init__(self, denoiser: Denoiser, config: EraseConfig, mask: Tensor | None = None) -> None:
        super().__init__()
        divergence = fdu_kernels.get_divergence(config.divergence)
        self.config = config
        self.mask = None if mask is None else mask.to(denoiser.device)[None]
        self.criterion = fdu_kernels.GaussianDivergenceLoss(
            divergence,
            sigma=config.sigma,
            s0=config.s0,
            distance=config.distance,
            synchronize=True,
        ).to(denoiser.device)
        # Standardised to h'(0) = 1, so that learning rate and preservation weight mean the same for every divergence.
        # Where f has a kink the slope at 0 is infinite or zero, and the slope at s = 1 stands in.
        self.slope = divergence.slope_at_zero
        if not 0 < self.slope < math.inf:
            self.slope = float(divergence.profile_grad(torch.ones((), dtype=torch.float64)))
        self.weighting = None
        if config.weighting != "unit":
            tables = (denoiser.signal, denoiser.noise, denoiser.prediction_type, config.snr_gamma or SNR_GAMMA)
            self.weighting = weights(config.weighting, *tables).to(denoiser.device)
        if config.weighting_scheme in SCHEME_WEIGHTS:
            self.weighting = scheme_weights(config.weighting_scheme, denoiser.noise).to(denoiser.device)
        self.game: VariationalGame | None = None
        if config.variational:
            self.game = VariationalGame(
                divergence,
                channels=denoiser.latent_shape[0],
                learning_rate=config.critic_learning_rate,
                seed=config.seed,
                device=denoiser.device,
            )

    @property
    def sigma(self) -> float:
        return float(self.criterion.sigma)

    @torch.no_grad()
    def wanted(self, denoiser: Denoiser, examples: Examples, batch: Batch) -> Tensor:
        """The training target of each sample, [N, C, H, W]; call it while the denoiser is frozen."""
        size = batch.size

        def predict(noisy: Tensor, indices: Tensor, prompts: Tensor) -> Tensor:
            return denoiser.predict(noisy, indices, examples.conditioning[to_device(prompts, denoiser.device)])

        if batch.noise is not None:
            if len(batch.noisy) == size:
                return batch.noise
            kept = predict(batch.noisy[size:], batch.indices[size:], batch.anchors[size:])
            return torch.cat([batch.noise.to(kept.dtype), kept])
        if not self.config.negative_guidance:
            return predict(batch.noisy, batch.indices, batch.anchors)
        # Beside the others, what the frozen denoiser makes of the target.
        output = predict(
            torch.cat([batch.noisy, batch.noisy[:size]]),
            torch.cat([batch.indices, batch.indices[:size]]),
            torch.cat([batch.anchors, batch.reads[:size]]),
        )
        outputs, target = output[: len(batch.noisy)], output[len(batch.noisy) :]
        away = outputs[:size] + self.config.negative_guidance * (outputs[:size] - target)
        return torch.cat([away, outputs[size:]])

    def erased(self, predicted: Tensor, wanted: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The divergence of the samples that erase, [], and before that the critic's bound of it, [], 0 without one.

        Both are weighted by timestep and standardised to the slope 1 at 0. A critic moves first. Last, the squared
        distance s of each sample, [size]: a constant.
        """
        omega, scale = self._weights(batch)
        with nullcontext() if self.game is None else torch.no_grad():  # beside a critic for sigma and s alone
            erased, s = self.criterion(predicted, wanted, omega, self.mask, scale, return_distance=True)
            erased = erased / self.slope
        if self.game is None:
            return erased, torch.zeros_like(erased), s
        bound = self.teach(predicted, wanted, batch)
        return self.game.model_loss(Outputs(predicted, wanted, omega, self.mask, scale)) / self.slope, bound, s

    def observe(self, predicted: Tensor, wanted: Tensor, batch: Batch) -> None:
        """Let an automatic sigma see outputs of samples that erase."""
        omega, scale = self._weights(batch)
        self.criterion(predicted, wanted, omega, self.mask, scale)

    def teach(self, predicted: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        """Train the critic alone by one step, and return its bound before, standardised, []."""
        assert self.game is not None
        omega, scale = self._weights(batch)
        return self.game.critic_step(Outputs(predicted, wanted, omega, self.mask, scale)) / self.slope

    @torch.no_grad()
    def losses(self, s: Tensor, batch: Batch) -> Tensor:
        """The loss of each sample that erases, [size], from its s, without what makes up for uneven timesteps."""
        omega, _ = self._weights(dataclasses.replace(batch, timestep_weight=None))
        losses = self.criterion.divergence.profile(s)
        return (losses if omega is None else omega * losses).float()

    def distance(self, s: Tensor, batch: Batch) -> Tensor:
        """The median squared distance of erasing outputs from their targets, [], from the s of each."""
        _, scale = self._weights(batch)
        sigma = self.criterion.sigma if scale is None else self.criterion.sigma * scale
        return (s * sigma * sigma).median()

    def _weights(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """omega and the relative sigma of the samples that erase; None where all are 1."""
        if self.weighting is None:
            return batch.timestep_weight, None
        indices = batch.indices[: batch.size]
        omega, scale = self.weighting.omega[indices], self.weighting.scale[indices]
        return omega if batch.timestep_weight is None else omega * batch.timestep_weight, scale

    def kept(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """The mean squared error of the samples that preserve, with the same sigma, []."""
        return fdu_kernels.gaussian_divergence(
            predicted, wanted, "mse", sigma=self.criterion.sigma, distance=self.config.distance
        )
