"""FLUX.1: a transformer over 2x2 patches of the latents that attends jointly to image and text."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import JOINT_ATTENTION, Conditioning
from fdu.models.patches import PatchFlowDenoiser, pack, position_ids, unpack


class FluxDenoiser(PatchFlowDenoiser):
    """A FluxTransformer2DModel, guided by a scale that it reads."""

    family = "FLUX.1 (a FluxTransformer2DModel)"
    module_class = FluxTransformer2DModel
    kohya = kohya_names.FLUX
    parts = ("scheduler", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    # Of the double blocks alone: single blocks project text and image by one to_k and to_v, so those would not be the
    # prompt's alone. ESD trains these two, EraseAnything the keys.
    context_projections = ("attn.add_k_proj", "attn.add_v_proj")
    # All of the text enters by the first, and the pooled embedding reaches every block by the second.
    other_readers = ("context_embedder", "time_text_embed.text_embedder.linear_1")
    text_inputs: ClassVar = {
        "embeddings": ("context_embedder",),
        "pooled": ("time_text_embed.text_embedder.linear_1",),
    }
    tokenizers = ("tokenizer_2",)
    attention_projections = JOINT_ATTENTION

    @property
    def guided_by_empty(self) -> bool:
        return False  # its guidance is an input

    @property
    def few_steps(self) -> str | None:
        if not self.reads_guidance:
            return "its transformer reads no guidance, as that of FLUX.1 schnell"
        return super().few_steps

    @property
    def reads_guidance(self) -> bool:
        return bool(self.config.guidance_embeds)

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        with self.text_device:  # the pipeline makes position ids, which it then moves to the device
            embeddings, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.text_device)
        return Conditioning({"embeddings": embeddings, "pooled": pooled})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        embeddings = conditioning.tensors["embeddings"]
        told = noisy.new_full((len(noisy),), self.embedded_guidance, dtype=torch.float32)
        guidance = told if self.reads_guidance else None
        packed = self.module(
            pack(noisy),
            embeddings,
            conditioning.tensors["pooled"],
            self.timesteps(indices),
            img_ids=position_ids(height // 2, width // 2, noisy.device),
            txt_ids=noisy.new_zeros(embeddings.shape[1], 3),
            guidance=guidance,
        ).sample
        return unpack(packed, height, width)
