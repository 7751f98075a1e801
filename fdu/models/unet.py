"""Stable Diffusion 1.x, 2.x and XL: a UNet that reads one or two text encoders through cross-attention."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import Conditioning
from fdu.models.noise_schedules import DiffusionDenoiser
from fdu.models.staging import to_device

FURTHER_INPUTS = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""Settings of a UNet that reads more than x_t, t and the prompt: distilled guidance, classes, images."""


class UNetDenoiser(DiffusionDenoiser):
    """A UNet2DConditionModel with one text encoder, predicting epsilon, v or the sample."""

    family = "Stable Diffusion 1.x and 2.x (a UNet2DConditionModel with one text encoder)"
    module_name = "unet"
    module_class = UNet2DConditionModel
    kohya = kohya_names.SD
    addition_embed_type: ClassVar[str | None] = None
    """The kind of embedding that the UNet adds to that of the timestep."""

    @classmethod
    def owns(cls, module: Any) -> bool:
        return super().owns(module) and module.config.addition_embed_type == cls.addition_embed_type

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        super().check(pipeline)
        further = [name for name in FURTHER_INPUTS if pipeline.unet.config.get(name) is not None]
        if further:
            raise ValueError(
                f"pipeline's unet reads more than x_t, t and prompts (its config sets {', '.join(further)}); "
                "unload an IP-Adapter with pipeline.unload_ip_adapter(), or give the model it was distilled from"
            )

    @property
    def size_unit(self) -> int:
        return math.lcm(8, super().size_unit)  # the pipelines ask for multiples of 8 whatever their VAE

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings = self.pipeline.encode_prompt(
            prompts, device=self.text_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return Conditioning({"embeddings": embeddings})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(noisy, indices, conditioning.tensors["embeddings"]).sample


class SDXLDenoiser(UNetDenoiser):
    """A UNet2DConditionModel with two text encoders; prompt "" is the unconditional of the pipeline's guidance."""

    family = "Stable Diffusion XL (a UNet2DConditionModel with two text encoders)"
    parts = ("scheduler", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    addition_embed_type = "text_time"
    other_readers = ("add_embedding.linear_1",)  # the pooled embedding, beside the sizes
    text_inputs: ClassVar = {**UNetDenoiser.text_inputs, "pooled": other_readers}
    kohya = kohya_names.SDXL

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
                f"pipeline's unet takes {taken} numbers besides the prompt where the six time ids and the pooled "
                f"embedding of an SDXL base model make {made}; train a base model with its own text encoders"
            )

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.text_device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            told = to_device(torch.tensor([prompt != "" for prompt in prompts]), self.text_device)
            embeddings = embeddings.where(told[:, None, None], 0)
            pooled = pooled.where(told[:, None], 0)
        return Conditioning({"embeddings": embeddings, "pooled": pooled})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        embeddings, pooled = conditioning.tensors["embeddings"], conditioning.tensors["pooled"]
        scale = self.pixels_per_latent
        # Height and width of the original, the crop at (0, 0), height and width of the target, as the pipeline tells
        # them of its own images; filled in on the device, without a copy from the host at every step.
        time_ids = embeddings.new_zeros(len(noisy), 6)
        time_ids[:, 0::4] = noisy.shape[-2] * scale
        time_ids[:, 1::4] = noisy.shape[-1] * scale
        return self.module(
            noisy, indices, embeddings, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample
