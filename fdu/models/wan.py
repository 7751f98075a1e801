"""Wan 2.1 and Wan 2.2 5B: a transformer over the patches of a video that reads UMT5 through cross-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import DiffusionPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import Conditioning, call_default
from fdu.models.noise_schedules import FlowDenoiser


class WanDenoiser(FlowDenoiser):
    """A WanTransformer3DModel, which reads the padding of the prompt as zeros and no mask. It draws videos."""

    family = "Wan 2.1 and 2.2 5B (a WanTransformer3DModel)"
    module_class = WanTransformer3DModel
    kohya = kohya_names.WAN
    guides_in_turn = True
    encodes_videos = True
    draws_videos = True
    text_inputs: ClassVar = {"embeddings": ("condition_embedder.text_embedder.linear_1",)}

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        if getattr(pipeline, "transformer_2", None) is not None or pipeline.config.get("boundary_ratio") is not None:
            raise ValueError(
                "pipeline has one transformer for noisy timesteps and another for the rest (Wan 2.2 A14B), and fdu "
                "trains only one; erase from a Wan with a single transformer: Wan 2.1, or Wan 2.2 5B"
            )
        super().check(pipeline)

    @property
    def pixels_per_latent(self) -> int:
        scale: int = self.pipeline.vae_scale_factor_spatial
        return scale

    @property
    def native_size(self) -> tuple[int, int] | None:
        return call_default(self.pipeline, "height"), call_default(self.pipeline, "width")

    @property
    def size_unit(self) -> int:
        return math.lcm(16, self.pixels_per_latent * self.token_side)  # the pipeline asks for multiples of 16

    @property
    def latent_shape(self) -> tuple[int, ...]:
        channels, height, width = super().latent_shape
        return channels, (self.frames - 1) // self.pipeline.vae_scale_factor_temporal + 1, height, width

    @property
    def token_side(self) -> int:
        side: int = self.config.patch_size[-1]
        return side

    @property
    def call_settings(self) -> dict[str, Any]:
        return {"num_frames": self.frames}

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        return super().tokens([prompt_clean(prompt) for prompt in prompts])

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.text_device,
            max_sequence_length=call_default(self.pipeline, "max_sequence_length"),
        )
        return Conditioning({"embeddings": embeddings})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        timesteps = self.timesteps(indices)
        if self.pipeline.config.expand_timesteps:
            # One per token: the model can also be given a first frame without noise.
            frames, height, width = noisy.shape[-3:]
            timesteps = timesteps[:, None].expand(-1, frames * (height // self.token_side) * (width // self.token_side))
        return self.module(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=conditioning.tensors["embeddings"],
        ).sample

    def _frame_count(self, num_frames: int | None) -> int:
        unit = self.pipeline.vae_scale_factor_temporal
        frames: int = call_default(self.pipeline, "num_frames") if num_frames is None else num_frames
        if frames % unit != 1 % unit:
            raise ValueError(
                f"num_frames must be 1 and a multiple of {unit}, got {frames}; try {frames // unit * unit + 1}"
            )
        return frames
