"""Sana: a transformer with linear attention that reads Gemma through cross-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, SanaTransformer2DModel
from torch import Tensor

from fdu.models.denoiser import Conditioning, call_default
from fdu.models.noise_schedules import FlowDenoiser
from fdu.models.staging import to_device


class SanaDenoiser(FlowDenoiser):
    """A SanaTransformer2DModel. Its conditioning holds the attention mask of the prompt, an integer tensor."""

    family = "Sana (a SanaTransformer2DModel)"
    module_class = SanaTransformer2DModel
    text_inputs: ClassVar = {"embeddings": ("caption_projection.linear_1",)}

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        super().check(pipeline)
        if pipeline.transformer.config.guidance_embeds:
            raise ValueError("pipeline is distilled (Sana Sprint); train the model it was distilled from")

    @property
    def call_settings(self) -> dict[str, Any]:
        return {"use_resolution_binning": False}

    @property
    def size_unit(self) -> int:
        return math.lcm(32, super().size_unit * self.config.patch_size)

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        # The pipeline reads prompts behind an instruction, of which it keeps the embedding of the first token alone.
        instruction = "\n".join(call_default(self.pipeline, "complex_human_instruction"))
        skipped = len(self.pipeline.tokenizer.encode(instruction)) - 1
        cleaned = self.pipeline._text_preprocessing(list(prompts))
        behind = [instruction + one if prompt else "" for prompt, one in zip(prompts, cleaned, strict=True)]
        (found,) = super().tokens(behind)
        return [[[*one[:1], *one[skipped:]] if prompt else one for prompt, one in zip(prompts, found, strict=True)]]

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, mask = self._encode(prompts, call_default(self.pipeline, "complex_human_instruction"))
        if "" in prompts:
            # The pipeline puts its instruction to Gemma before every prompt but the empty one of guidance.
            empty = to_device(torch.tensor([prompt == "" for prompt in prompts]), self.text_device)[:, None]
            without_embeddings, without_mask = self._encode([""], None)
            embeddings = embeddings.where(~empty[..., None], without_embeddings)
            mask = mask.where(~empty, without_mask)
        return Conditioning({"embeddings": embeddings, "mask": mask})

    def told_timesteps(self) -> Tensor:
        return super().told_timesteps() * self.config.timestep_scale

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(
            noisy,
            conditioning.tensors["embeddings"],
            self.timesteps(indices),
            encoder_attention_mask=conditioning.tensors["mask"],
        ).sample

    def _encode(self, prompts: list[str], instruction: list[str] | None) -> tuple[Tensor, Tensor]:
        embeddings, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.text_device,
            max_sequence_length=call_default(self.pipeline, "max_sequence_length"),
            complex_human_instruction=instruction,
        )
        return embeddings, mask
