"""Denoisers of diffusion models: x_t = sqrt(abar) x_0 + sqrt(1 - abar) epsilon on the grid of DDPM's timesteps."""

from __future__ import annotations

from diffusers import DDPMScheduler, DiffusionPipeline

from fdu.models.denoiser import Denoiser


class DiffusionDenoiser(Denoiser):
    """A denoiser that predicts epsilon, v or the sample, and takes the index on the grid for its timestep."""

    def __init__(self, pipeline: DiffusionPipeline, resolution: int | None = None) -> None:
        super().__init__(pipeline, resolution)
        # The pipeline's own scheduler is made to sample; noising and timesteps for training follow DDPM.
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.signal = schedule.alphas_cumprod.sqrt()
        self.noise = (1 - schedule.alphas_cumprod).sqrt()
        self.prediction_type = schedule.config.prediction_type

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
