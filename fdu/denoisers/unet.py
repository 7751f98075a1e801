"""Stable Diffusion 1.x and 2.x: a UNet that reads one text encoder through cross-attention."""

from __future__ import annotations

from typing import ClassVar, Literal

from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from fdu.denoisers.base import Conditioning, Denoiser


class UNetDenoiser(Denoiser):
    """A UNet2DConditionModel with one text encoder, predicting epsilon, v or the sample."""

    family = "Stable Diffusion 1.x and 2.x (a UNet2DConditionModel with one text encoder)"
    module_name: ClassVar[Literal["unet", "transformer"]] = "unet"
    context_projections = ("attn2.to_k", "attn2.to_v")
    attention_projections = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        super().__init__(pipeline)
        # The pipeline's own scheduler is made to sample; noising and timesteps for training follow DDPM.
        schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.signal = schedule.alphas_cumprod.sqrt()
        self.noise = (1 - schedule.alphas_cumprod).sqrt()
        self.prediction_type = schedule.config.prediction_type

    @staticmethod
    def fits(pipeline: DiffusionPipeline) -> bool:
        return is_plain_unet(pipeline) and getattr(pipeline, "text_encoder_2", None) is None

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)[0]
        return Conditioning({"embeddings": embeddings})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(noisy, indices, conditioning.tensors["embeddings"]).sample


def is_plain_unet(pipeline: DiffusionPipeline) -> bool:
    """Whether a UNet makes images from prompts alone: inpainting and editing models take further channels."""
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DConditionModel) or not hasattr(pipeline, "encode_prompt"):
        return False
    plain = unet.config.in_channels == pipeline.vae.config.latent_channels
    return plain and getattr(pipeline, "controlnet", None) is None
