"""CogView 4: a transformer of a single stream of text and image that reads GLM, each prompt at its own length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import CogView4Transformer2DModel
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from torch import Tensor

from fdu.models.denoiser import Conditioning
from fdu.models.noise_schedules import FlowDenoiser

TEXT_UNIT = 16
"""The pipeline pads a prompt in front to a multiple of so many tokens."""


class CogView4Denoiser(FlowDenoiser):
    """A CogView4Transformer2DModel.

    It has no mask for padding that is not its own: prompts of different lengths pass it one length after another.
    """

    family = "CogView 4 (a CogView4Transformer2DModel)"
    module_class = CogView4Transformer2DModel
    guides_in_turn = True
    # The only layer that reads text alone: every block projects text and image by the same layers.
    context_projections = ("patch_embed.text_proj",)
    text_inputs: ClassVar = {"embeddings": context_projections}

    @property
    def size_unit(self) -> int:
        return math.lcm(16, super().size_unit * self.config.patch_size)

    def dynamic_shift(self, tokens: int) -> float:
        config = self.pipeline.scheduler.config
        return calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("base_shift", 0.25),
            config.get("max_shift", 0.75),
        )

    def told_timesteps(self) -> Tensor:
        return torch.arange(1, len(self.noise) + 1, dtype=torch.float32)  # before the shift

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        (found,) = super().tokens(prompts)
        padding = self.pipeline.tokenizer.pad_token_id
        return [[[*[padding] * (-len(one) % TEXT_UNIT), *one] for one in found]]

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        # One by one: the pipeline would pad a prompt to the length of others, and GLM reads that padding.
        parts = []
        for prompt in prompts:
            embeddings, _ = self.pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, device=self.text_device
            )
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
            parts.append(Conditioning({"embeddings": embeddings, "mask": mask}))
        return Conditioning.cat(parts)

    def together(self, conditioning: Conditioning) -> list[Tensor]:
        return [rows for rows, _ in conditioning.by_length()]

    def prompt_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        ((_, own),) = conditioning.by_length()
        return {"prompt_embeds": own.tensors["embeddings"]}

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        timesteps = self.timesteps(indices)
        places, outputs = [], []
        for rows, own in conditioning.by_length():
            outputs.append(self._predict(noisy[rows], timesteps[rows], own.tensors["embeddings"]))
            places.append(rows)
        return torch.cat(outputs)[torch.cat(places).argsort()]

    def _predict(self, noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        scale = self.pixels_per_latent
        # Height and width of the original and of the target, and the crop, as the pipeline tells them of its images.
        size = embeddings.new_empty(len(noisy), 2)
        size[:, 0], size[:, 1] = noisy.shape[-2] * scale, noisy.shape[-1] * scale
        return self.module(noisy, embeddings, timesteps, size, size, torch.zeros_like(size)).sample
