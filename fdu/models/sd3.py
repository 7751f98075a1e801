"""Stable Diffusion 3 and 3.5: a transformer that attends jointly to image and text (MMDiT)."""

from __future__ import annotations

from typing import ClassVar

from diffusers import DiffusionPipeline, SD3Transformer2DModel
from torch import Tensor

from fdu.config import Size, sides
from fdu.models import kohya_names
from fdu.models.denoiser import JOINT_ATTENTION, Conditioning
from fdu.models.noise_schedules import FlowDenoiser


class SD3Denoiser(FlowDenoiser):
    """An SD3Transformer2DModel with two CLIP text encoders and, as in the pipeline, with or without T5."""

    family = "Stable Diffusion 3 (an SD3Transformer2DModel)"
    module_class = SD3Transformer2DModel
    parts = ("scheduler", "vae", "tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    # The text's own keys and values: what attn2.to_k and to_v are to a UNet. ESD trains them, EraseAnything the keys.
    context_projections = ("attn.add_k_proj", "attn.add_v_proj")
    # All of the text enters by the first, and the pooled embedding reaches every block by the second.
    other_readers = ("context_embedder", "time_text_embed.text_embedder.linear_1")
    text_inputs: ClassVar = {
        "embeddings": ("context_embedder",),
        "pooled": ("time_text_embed.text_embedder.linear_1",),
    }
    tokenizers = ("tokenizer", "tokenizer_3")
    attention_projections = JOINT_ATTENTION
    kohya = kohya_names.SD3

    def __init__(
        self, pipeline: DiffusionPipeline, resolution: Size | None = None, num_frames: int | None = None
    ) -> None:
        super().__init__(pipeline, resolution, num_frames)
        largest = self.config.pos_embed_max_size * self.size_unit
        for name, side in sides(resolution or (self.height, self.width)).items():
            if side > largest:
                raise ValueError(f"{name} must be at most {largest} pixels for this model, got {side}")

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        super().check(pipeline)
        if pipeline.text_encoder_3 is not None and pipeline.tokenizer_3 is None:
            raise ValueError("pipeline has a text_encoder_3 but no tokenizer_3; load it with both or with neither")

    @property
    def size_unit(self) -> int:
        return super().size_unit * self.config.patch_size

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.text_device, do_classifier_free_guidance=False
        )
        return Conditioning({"embeddings": embeddings, "pooled": pooled})

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(
            noisy,
            conditioning.tensors["embeddings"],
            conditioning.tensors["pooled"],
            self.timesteps(indices),
        ).sample
