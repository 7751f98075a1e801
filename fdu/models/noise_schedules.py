"""The two noise schedules, each a kind of denoiser: DDPM's diffusion and rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from fdu.config import Size
from fdu.models.denoiser import Denoiser


class DiffusionDenoiser(Denoiser):
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon on the grid of DDPM's timesteps.

    The module predicts epsilon, v or the sample, and takes the index on the grid for its timestep.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, resolution: Size | None = None, num_frames: int | None = None
    ) -> None:
        super().__init__(pipeline, resolution, num_frames)
        # The pipeline's own scheduler is made to sample; noising and timesteps for training follow DDPM.
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.signal = schedule.alphas_cumprod.sqrt()
        self.noise = (1 - schedule.alphas_cumprod).sqrt()
        self.prediction_type = schedule.config.prediction_type

    @property
    def few_steps(self) -> str | None:
        scheduler = self.pipeline.scheduler
        # A schedule that ends in noise alone is sampled from its end, too, but then the module predicts v.
        if self.prediction_type == "epsilon" and scheduler.config.get("timestep_spacing") == "trailing":
            return "its scheduler has timestep_spacing 'trailing', as those of Turbo and Lightning"
        return super().few_steps

    def index_of(self, told: float) -> int:
        return min(round(told), len(self.noise) - 1)

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        super().check(pipeline)
        scheduler = pipeline.scheduler
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        if "beta_start" not in scheduler.config or prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"pipeline's scheduler, a {type(scheduler).__name__} with prediction_type {prediction_type!r}, does "
                "not add noise as DDPM does; if the model was trained with DDPM, use a scheduler like DDIMScheduler"
            )


class FlowDenoiser(Denoiser):
    """x_t = (1 - sigma) x_0 + sigma epsilon, on a grid shifted towards noise like that of the pipeline's scheduler.

    The module predicts epsilon - x_0.
    """

    prediction_type = "flow"

    def __init__(
        self, pipeline: DiffusionPipeline, resolution: Size | None = None, num_frames: int | None = None
    ) -> None:
        super().__init__(pipeline, resolution, num_frames)
        height, width = self.latent_shape[-2:]
        shift = self.dynamic_shift((height // self.token_side) * (width // self.token_side))
        self.noise = shifted_sigmas(pipeline.scheduler, shift)
        self.signal = 1 - self.noise
        self._timesteps = self.told_timesteps()

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        super().check(pipeline)
        scheduler = pipeline.scheduler
        if not (type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas")):
            raise ValueError(
                f"pipeline's scheduler, a {type(scheduler).__name__}, does not follow a rectified flow; give the "
                "pipeline the one that the model came with, or a FlowMatchEulerDiscreteScheduler"
            )

    @property
    def token_side(self) -> int:
        """Latent pixels per side of a token of the module."""
        return self.packing * self.config.patch_size

    def dynamic_shift(self, tokens: int) -> float:
        """mu, by which the pipeline shifts the grid for images of ``tokens`` tokens if its scheduler does so."""
        config = self.pipeline.scheduler.config
        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    def told_timesteps(self) -> Tensor:
        """What the module is told at every index of the grid, float32 [T]: as a rule sigma times the number of
        training timesteps."""
        return self.noise * self.pipeline.scheduler.config.num_train_timesteps

    def index_of(self, told: float) -> int:
        return int((self._timesteps - told).abs().argmin())

    def timesteps(self, indices: Tensor) -> Tensor:
        """What the module is told, float32 [N], at indices [N] of the grid."""
        self._timesteps = self._timesteps.to(indices.device)
        return self._timesteps[indices]


def shifted_sigmas(scheduler: Any, dynamic_shift: float) -> Tensor:
    """sigma on the training grid, float32 [T] ascending to 1, shifted as the scheduler's settings say.

    The shift is that of Esser et al. 2024 (arXiv 2403.03206), section 5.3.2. ``dynamic_shift`` is its logarithm, mu, of
    schedulers that shift by the size of the image.
    """
    config = scheduler.config
    sigmas = torch.arange(1, config.num_train_timesteps + 1, dtype=torch.float32) / config.num_train_timesteps
    if config.get("use_dynamic_shifting"):
        sigmas = scheduler.time_shift(dynamic_shift, 1.0, sigmas)
    else:
        shift = config.get("shift", config.get("flow_shift", 1.0))
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    terminal = config.get("shift_terminal")
    if terminal:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[0])
    return sigmas
