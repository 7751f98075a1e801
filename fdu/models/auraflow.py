"""AuraFlow: a transformer that attends jointly to image and text, first in blocks of two streams, then of one."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from diffusers import AuraFlowTransformer2DModel, DiffusionPipeline
from torch import Tensor

from fdu.config import Size, sides
from fdu.models import kohya_names
from fdu.models.denoiser import JOINT_ATTENTION, Conditioning
from fdu.models.noise_schedules import FlowDenoiser


class AuraFlowDenoiser(FlowDenoiser):
    """An AuraFlowTransformer2DModel, which reads the padding of the prompt as zeros and no mask."""

    family = "AuraFlow (an AuraFlowTransformer2DModel)"
    module_class = AuraFlowTransformer2DModel
    kohya = kohya_names.AURAFLOW
    # Of the blocks of two streams alone: the others project text and image by one to_k and to_v.
    context_projections = ("attn.add_k_proj", "attn.add_v_proj")
    other_readers = ("context_embedder",)  # all of the text enters by it
    text_inputs: ClassVar = {"embeddings": other_readers}
    attention_projections = JOINT_ATTENTION

    def __init__(
        self, pipeline: DiffusionPipeline, resolution: Size | None = None, num_frames: int | None = None
    ) -> None:
        super().__init__(pipeline, resolution, num_frames)
        largest = math.isqrt(self.config.pos_embed_max_size) * self.size_unit
        for name, side in sides(resolution or (self.height, self.width)).items():
            if side > largest:
                raise ValueError(f"{name} must be at most {largest} pixels for this model, got {side}")

    @property
    def size_unit(self) -> int:
        return super().size_unit * self.config.patch_size

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, _, _, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.text_device
        )
        return Conditioning({"embeddings": embeddings})

    def prompt_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        embeddings = conditioning.tensors["embeddings"]
        # The pipeline asks for a mask, and uses none.
        mask = embeddings.new_ones(embeddings.shape[:2])
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}

    def told_timesteps(self) -> Tensor:
        return self.noise

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        return self.module(
            noisy,
            encoder_hidden_states=conditioning.tensors["embeddings"],
            timestep=self.timesteps(indices),
        ).sample
