"""Stable Diffusion XL: a UNet that reads two text encoders, their pooled embedding and the size of the image."""

from __future__ import annotations

from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fdu.models.denoiser import Conditioning
from fdu.models.kohya_names import KohyaNames
from fdu.models.unet import UNetDenoiser, kohya_layers


class SDXLDenoiser(UNetDenoiser):
    """A UNet2DConditionModel with two text encoders; prompt "" is the unconditional of the pipeline's guidance."""

    family = "Stable Diffusion XL (a UNet2DConditionModel with two text encoders)"
    parts = ("scheduler", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    addition_embed_type = "text_time"
    kohya = KohyaNames(partial(kohya_layers, original_last=True), lambda pipeline: "sdxl_base_v1-0")

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        if pipeline.config.get("requires_aesthetics_score"):
            raise ValueError("pipeline is an SDXL refiner, which only finishes images; train the base model")
        super().check(pipeline)
        config = pipeline.unet.config
        taken = config.projection_class_embeddings_input_dim
        made = 6 * config.addition_time_embed_dim + pipeline.text_encoder_2.config.projection_dim
        if taken != made:
            raise ValueError(
                f"pipeline's unet takes {taken} numbers beside the prompt where the six time ids and the pooled "
                f"embedding of an SDXL base model make {made}; train a base model with its own text encoders"
            )

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            told = torch.tensor([prompt != "" for prompt in prompts], device=self.device)
            embeddings = embeddings.where(told[:, None, None], 0)
            pooled = pooled.where(told[:, None], 0)
        return Conditioning({"embeddings": embeddings, "pooled": pooled})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        embeddings, pooled = conditioning.tensors["embeddings"], conditioning.tensors["pooled"]
        scale = self.pipeline.vae_scale_factor
        # Height and width of the original, the crop at (0, 0), height and width of the target, as the pipeline tells
        # them of its own images; filled in on the device, without a copy from the host at every step.
        time_ids = embeddings.new_zeros(len(noisy), 6)
        time_ids[:, 0::4] = noisy.shape[-2] * scale
        time_ids[:, 1::4] = noisy.shape[-1] * scale
        return self.module(
            noisy, indices, embeddings, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample
