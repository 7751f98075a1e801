"""FLUX.1: a transformer over 2x2 patches of the latents that attends jointly to image and text."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import Conditioning
from fdu.models.noise_schedules import FlowDenoiser


class FluxDenoiser(FlowDenoiser):
    """A FluxTransformer2DModel; what is packed for it is unpacked again here."""

    family = "FLUX.1 (a FluxTransformer2DModel)"
    module_class = FluxTransformer2DModel
    kohya = kohya_names.FLUX
    parts = ("scheduler", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    packing = 2
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
    attention_projections = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    )

    @property
    def guided_by_empty(self) -> bool:
        return False  # its guidance is an input

    @property
    def reads_guidance(self) -> bool:
        return bool(self.config.guidance_embeds)

    @property
    def native_size(self) -> tuple[int, int] | None:
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        with self.device:  # the pipeline makes position ids, which it then moves to the device
            embeddings, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device)
        return Conditioning({"embeddings": embeddings, "pooled": pooled})

    def unpacked(self, latents: Tensor) -> Tensor:
        return unpack(latents, *self.latent_shape[1:])

    def told_timesteps(self) -> Tensor:
        return self.noise

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


def pack(latents: Tensor) -> Tensor:
    """Patches [N, (H/2) (W/2), 4 C] of latents [N, C, H, W]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Latents [N, C, H, W] of patches [N, (H/2) (W/2), 4 C]."""
    return F.pixel_shuffle(packed.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def position_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of every patch, [rows * columns, 3]."""
    return torch.cartesian_prod(*(torch.arange(float(count), device=device) for count in (1, rows, columns)))
