"""Lumina Image 2: a transformer of a single stream that reads Gemma through two blocks of the text's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import Conditioning
from fdu.models.noise_schedules import FlowDenoiser

REFINERS = ("context_refiner.0", "context_refiner.1")
"""The blocks that read text alone."""


class Lumina2Denoiser(FlowDenoiser):
    """A Lumina2Transformer2DModel, which predicts x_0 - epsilon, and whose time is 1 at the clean image.

    Its conditioning holds the attention mask of the prompt, an integer tensor.
    """

    family = "Lumina Image 2 (a Lumina2Transformer2DModel)"
    module_class = Lumina2Transformer2DModel
    kohya = kohya_names.LUMINA2
    guides_in_turn = True
    # Behind the refiners every block projects text and image by one to_k and to_v.
    context_projections = tuple(f"{block}.attn.{part}" for block in REFINERS for part in ("to_k", "to_v"))
    other_readers = ("caption_embedder.1",)  # all of the text enters by it
    text_inputs: ClassVar = {"embeddings": other_readers}

    @property
    def size_unit(self) -> int:
        return super().size_unit * self.config.patch_size

    def dynamic_shift(self, tokens: int) -> float:
        return super().dynamic_shift(self.config.in_channels)  # which the pipeline takes for the number of tokens

    def told_timesteps(self) -> Tensor:
        return 1 - self.noise

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        before = f"{self.pipeline.system_prompt} <Prompt Start> "
        return super().tokens([before + prompt if prompt else "" for prompt in prompts])

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.text_device
        )
        if "" in prompts:
            # The pipeline puts its instruction to Gemma before every prompt but the empty one of guidance.
            told = torch.tensor([prompt != "" for prompt in prompts], device=self.text_device)[:, None]
            _, _, empty, empty_mask = self.pipeline.encode_prompt("", negative_prompt="", device=self.text_device)
            embeddings, mask = embeddings.where(told[..., None], empty), mask.where(told, empty_mask)
        return Conditioning({"embeddings": embeddings, "mask": mask})

    def read_by_inputs(self, name: str, tensor: Tensor) -> Tensor:
        return self.pipeline.transformer.time_caption_embed.caption_embedder[0](tensor)

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        return -self.module(
            noisy,
            self.timesteps(indices),
            conditioning.tensors["embeddings"],
            conditioning.tensors["mask"],
        ).sample
