"""Stable Diffusion 1.x and 2.x: a UNet that reads one text encoder through cross-attention."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from fdu.models.denoiser import Conditioning
from fdu.models.diffusion import DiffusionDenoiser

FURTHER_INPUTS = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""Settings of a UNet that reads more than x_t, t and the prompt: distilled guidance, classes, images."""


class UNetDenoiser(DiffusionDenoiser):
    """A UNet2DConditionModel with one text encoder, predicting epsilon, v or the sample."""

    family = "Stable Diffusion 1.x and 2.x (a UNet2DConditionModel with one text encoder)"
    module_name: ClassVar[Literal["unet", "transformer"]] = "unet"
    module_class = UNet2DConditionModel
    context_projections = ("attn2.to_k", "attn2.to_v")
    attention_projections = ("to_q", "to_k", "to_v", "to_out.0")
    addition_embed_type: ClassVar[str | None] = None
    """What the UNet adds to its timestep embedding."""

    @classmethod
    def fits(cls, pipeline: DiffusionPipeline) -> bool:
        return super().fits(pipeline) and pipeline.unet.config.addition_embed_type == cls.addition_embed_type

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
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        return Conditioning({"embeddings": embeddings})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(noisy, indices, conditioning.tensors["embeddings"]).sample
