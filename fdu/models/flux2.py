"""FLUX.2, dev and klein: a transformer that attends jointly to image and text, over latents in patches of 2x2."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import JOINT_ATTENTION, Conditioning, call_default
from fdu.models.patches import PatchFlowDenoiser


class Flux2Denoiser(PatchFlowDenoiser):
    """A Flux2Transformer2DModel that reads Mistral (dev) or Qwen3 (klein). A patch of 2x2 is one pixel of its latents.

    Of latents, klein's pipeline returns those that the autoencoder decodes, dev's those that the module makes.
    """

    family = "FLUX.2 (a Flux2Transformer2DModel)"
    module_class = Flux2Transformer2DModel
    kohya = kohya_names.FLUX2
    guides_in_turn = True
    optional_images = ("image",)
    # Of the double blocks alone: a single block projects text and image, and its MLP, by one layer.
    context_projections = ("attn.add_k_proj", "attn.add_v_proj")
    other_readers = ("context_embedder",)  # all of the text enters by it
    text_inputs: ClassVar = {"embeddings": other_readers}
    attention_projections = JOINT_ATTENTION

    @property
    def reads_guidance(self) -> bool:
        return bool(self.config.guidance_embeds)

    @property
    def guided_by_empty(self) -> bool:
        return not (self.reads_guidance or self.pipeline.config.get("is_distilled"))

    @property
    def few_steps(self) -> str | None:
        return "its config says is_distilled" if self.pipeline.config.get("is_distilled") else super().few_steps

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.config.in_channels, self.height // self.size_unit, self.width // self.size_unit

    @property
    def token_side(self) -> int:
        return 1

    def dynamic_shift(self, tokens: int) -> float:
        return compute_empirical_mu(tokens, call_default(self.pipeline, "num_inference_steps"))

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        # With their padding, which stands before or behind them and is read as they are.
        filled: dict[str, Any] = {
            "padding": "max_length",
            "truncation": True,
            "max_length": call_default(self.pipeline, "max_sequence_length"),
        }
        tokenizer = self.pipeline.tokenizer
        if hasattr(self.pipeline, "system_message"):
            told = format_input(list(prompts), self.pipeline.system_message)
            read = tokenizer.apply_chat_template(
                told, add_generation_prompt=False, tokenize=True, return_dict=True, **filled
            )
            return [read["input_ids"]]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for prompt in prompts
        ]
        return [tokenizer(texts, **filled)["input_ids"]]

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, _ = self.pipeline.encode_prompt(prompts, device=self.text_device)
        return Conditioning({"embeddings": embeddings})

    def unpacked(self, latents: Tensor) -> Tensor:
        if latents.ndim == 4:
            return F.pixel_unshuffle(latents, 2)
        return latents.mT.unflatten(2, self.latent_shape[1:])

    def stand_in(self, name: str) -> Any:
        if name != "vae":
            return None
        # An autoencoder that knows no mean and variance, so that klein's pipeline leaves the latents as they are.
        known = torch.nn.BatchNorm2d(self.config.in_channels, affine=False, device=self.device)
        return types.SimpleNamespace(bn=known, config=types.SimpleNamespace(batch_norm_eps=0.0))

    def standardised(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return (F.pixel_unshuffle(latents, 2) - mean) / deviation

    def raw(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return F.pixel_shuffle(latents * deviation + mean, 2)

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        embeddings = conditioning.tensors["embeddings"]
        told = noisy.new_full((len(noisy),), self.embedded_guidance, dtype=torch.float32)
        packed = self.module(
            noisy.flatten(2).mT,
            embeddings,
            self.timesteps(indices),
            img_ids=_places(1, *noisy.shape[-2:], 1, device=noisy.device),
            txt_ids=_places(1, 1, 1, embeddings.shape[1], device=noisy.device),
            guidance=told if self.reads_guidance else None,
        ).sample
        return packed.mT.unflatten(2, noisy.shape[-2:])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the patches, [4 C, 1, 1] each."""
        vae = self.pipeline.vae
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return vae.bn.running_mean[:, None, None].to(like), deviation[:, None, None].to(like)


def _places(*counts: int, device: torch.device) -> Tensor:
    """The four coordinates of every token of an image or a text."""
    return torch.cartesian_prod(*(torch.arange(count, device=device) for count in counts))
