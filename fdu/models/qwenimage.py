"""Qwen-Image: a transformer of two streams over 2x2 patches of the latents, which reads Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import JOINT_ATTENTION, Conditioning, call_default
from fdu.models.patches import PatchFlowDenoiser, pack, unpack


class QwenImageDenoiser(PatchFlowDenoiser):
    """A QwenImageTransformer2DModel. Its conditioning holds the mask of the prompt, an integer tensor."""

    family = "Qwen-Image (a QwenImageTransformer2DModel)"
    module_class = QwenImageTransformer2DModel
    kohya = kohya_names.QWEN_IMAGE
    guides_in_turn = True
    encodes_videos = True
    guidance_argument = "true_cfg_scale"
    asks_for_negative = True
    context_projections = ("attn.add_k_proj", "attn.add_v_proj")
    other_readers = ("txt_in",)  # all of the text enters by it
    text_inputs: ClassVar = {"embeddings": other_readers}
    attention_projections = JOINT_ATTENTION

    @classmethod
    def check(cls, pipeline: DiffusionPipeline) -> None:
        super().check(pipeline)
        config = pipeline.transformer.config
        further = [name for name in ("guidance_embeds", "use_additional_t_cond") if config.get(name)]
        if further:
            raise ValueError(
                f"pipeline's transformer reads more than x_t, t and prompts (its config sets {', '.join(further)}); "
                "give the text-to-image model it was made from"
            )

    @property
    def token_side(self) -> int:
        return self.packing  # which the config calls the patch size

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        template, skipped = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        (found,) = super().tokens([template.format(prompt) for prompt in prompts])
        return [[one[skipped:] for one in found]]

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, mask = self.pipeline.encode_prompt(
            prompts, device=self.text_device, max_sequence_length=call_default(self.pipeline, "max_sequence_length")
        )
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        return Conditioning({"embeddings": embeddings, "mask": mask})

    def prompt_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        embeddings, mask = conditioning.tensors["embeddings"], conditioning.tensors["mask"]
        return {"prompt_embeds": embeddings, "prompt_embeds_mask": mask}

    def read_by_inputs(self, name: str, tensor: Tensor) -> Tensor:
        return self.pipeline.transformer.txt_norm(tensor)

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        mask = conditioning.tensors["mask"]
        packed = self.module(
            pack(noisy),
            conditioning.tensors["embeddings"],
            None if mask.all() else mask,
            self.timesteps(indices),
            [[(1, height // 2, width // 2)]] * len(noisy),
        ).sample
        return unpack(packed, height, width)
