"""The denoiser behind a pipeline: how to encode a prompt, draw and noise a latent, and predict; one class a family.

The erase loop talks to this interface only, so it never asks which family of models it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

ENCODE_BATCH = 256
"""Prompts encoded at a time."""


class UNetDenoiser:
    """Stable Diffusion 1.x and 2.x: a UNet2DConditionModel that reads one text encoder through cross-attention."""

    context_projections = ("attn2.to_k", "attn2.to_v")
    """Name endings of the linear layers that read the prompt."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.module: UNet2DConditionModel = pipeline.unet
        # The pipeline's own scheduler is made to sample; noising and timesteps for training follow DDPM.
        self.schedule = DDPMScheduler.from_config(pipeline.scheduler.config)

    @property
    def device(self) -> torch.device:
        return self.module.device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [N, tokens, width] of prompts, in the dtype of the text encoder."""
        batches = [list(prompts[start : start + ENCODE_BATCH]) for start in range(0, len(prompts), ENCODE_BATCH)]
        encoded = [
            self.pipeline.encode_prompt(batch, self.device, 1, do_classifier_free_guidance=False)[0]
            for batch in batches
        ]
        return torch.cat(encoded)

    @torch.no_grad()
    def draw_latents(
        self, prompts: Sequence[str], steps: int, guidance_scale: float, seed: int, batch_size: int
    ) -> Tensor:
        """Sample a clean latent a prompt, fp32 [N, C, H, W]; latent i depends on its prompt and ``seed + i`` alone."""
        batches = []
        unbarred = getattr(self.pipeline, "_progress_bar_config", {})
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            for start in tqdm(range(0, len(prompts), batch_size), desc="latents", unit="batch"):
                batch = list(prompts[start : start + batch_size])
                generators = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
                drawn = self.pipeline(
                    batch,
                    num_inference_steps=steps,
                    guidance_scale=guidance_scale,
                    generator=generators,
                    output_type="latent",
                )
                # Half precision would round the noise away at the first timesteps.
                batches.append(drawn.images.float())
        finally:
            self.pipeline._progress_bar_config = unbarred
        return torch.cat(batches)

    def random_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps [count], uniform over the training schedule."""
        timesteps = torch.randint(self.schedule.config.num_train_timesteps, (count,), generator=generator)
        return timesteps.to(self.device, non_blocking=True)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t [N, C, H, W] from clean latents, noise and timesteps [N]."""
        return self.schedule.add_noise(latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        """The denoiser's output [N, C, H, W], epsilon or v as the model was trained."""
        return self.module(noisy, timesteps, embeddings).sample


def denoiser_of(pipeline: DiffusionPipeline) -> UNetDenoiser:
    """The denoiser of a pipeline.

    Raises:
        TypeError: the pipeline's family is not known here.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(
            f"pipeline must be a diffusers pipeline, got {type(pipeline).__name__}; load it with from_pretrained"
        )
    unet, second = getattr(pipeline, "unet", None), getattr(pipeline, "text_encoder_2", None)
    if isinstance(unet, UNet2DConditionModel) and second is None and hasattr(pipeline, "encode_prompt"):
        # Inpainting and editing models take further channels beside the latents.
        plain = unet.config.in_channels == pipeline.vae.config.latent_channels
        if plain and getattr(pipeline, "controlnet", None) is None:
            return UNetDenoiser(pipeline)
    raise TypeError(
        f"pipeline is a {type(pipeline).__name__}, whose family is not supported yet; supported: Stable Diffusion 1.x "
        "and 2.x (a UNet2DConditionModel with one text encoder). "
        "To add a family, write a class like UNetDenoiser in fdu/denoiser.py"
    )
