"""PixArt-alpha and PixArt-Sigma: a transformer that reads T5 through cross-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from fdu.models.denoiser import Conditioning, call_default
from fdu.models.noise_schedules import DiffusionDenoiser


class PixArtDenoiser(DiffusionDenoiser):
    """A PixArtTransformer2DModel. Its conditioning holds the attention mask of the prompt, an integer tensor."""

    family = "PixArt (a PixArtTransformer2DModel)"
    module_class = PixArtTransformer2DModel
    # Cleaning is the pipeline's default, but without these packages it warns at every prompt and leaves it.
    clean_caption = is_bs4_available() and is_ftfy_available()
    text_inputs: ClassVar = {"embeddings": ("caption_projection.linear_1",)}

    @property
    def call_settings(self) -> dict[str, Any]:
        return {"use_resolution_binning": False, "clean_caption": self.clean_caption}

    @property
    def size_unit(self) -> int:
        return math.lcm(8, super().size_unit * self.config.patch_size)

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        return super().tokens(self.pipeline._text_preprocessing(list(prompts), clean_caption=self.clean_caption))

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.text_device,
            clean_caption=self.clean_caption,
            max_sequence_length=call_default(self.pipeline, "max_sequence_length"),
        )
        return Conditioning({"embeddings": embeddings, "mask": mask})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        embeddings = conditioning.tensors["embeddings"]
        count, channels, height, width = noisy.shape
        micro: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.reads_size:
            scale = self.pixels_per_latent
            sides = [embeddings.new_full((count, 1), side * scale) for side in (height, width)]
            micro["resolution"] = torch.cat(sides, dim=1)
            micro["aspect_ratio"] = embeddings.new_full((count, 1), height / width)
        output = self.module(
            noisy,
            encoder_hidden_states=embeddings,
            encoder_attention_mask=conditioning.tensors["mask"],
            timestep=indices,
            added_cond_kwargs=micro,
        ).sample
        return output[:, :channels]  # behind them, where it is learned, the variance

    @property
    def reads_size(self) -> bool:
        """Whether the transformer is told the resolution and aspect ratio of the image."""
        told = self.config.use_additional_conditions
        return self.config.sample_size == 128 if told is None else told
