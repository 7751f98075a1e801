"""Chroma: FLUX.1's transformer without a pooled embedding, guided by a second prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import ChromaTransformer2DModel
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import JOINT_ATTENTION, Conditioning
from fdu.models.patches import PatchFlowDenoiser, pack, position_ids, unpack


class ChromaDenoiser(PatchFlowDenoiser):
    """A ChromaTransformer2DModel.

    Its conditioning holds the pipeline's mask of the prompt, an integer tensor. diffusers (0.42) adds its ones and
    zeros to the logits of attention, so that it hides nothing; hence its other name.
    """

    family = "Chroma (a ChromaTransformer2DModel)"
    module_class = ChromaTransformer2DModel
    kohya = kohya_names.CHROMA
    guides_in_turn = True
    # As in FLUX.1: of the double blocks alone, because single blocks project text and image by one to_k and to_v.
    context_projections = ("attn.add_k_proj", "attn.add_v_proj")
    other_readers = ("context_embedder",)  # all of the text enters by it
    text_inputs: ClassVar = {"embeddings": other_readers}
    attention_projections = JOINT_ATTENTION

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        embeddings, _, mask, _, _, _ = self.pipeline.encode_prompt(
            prompts, device=self.text_device, do_classifier_free_guidance=False
        )
        return Conditioning({"embeddings": embeddings, "added_mask": mask.long()})

    def prompt_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        embeddings, mask = conditioning.tensors["embeddings"], conditioning.tensors["added_mask"]
        return {"prompt_embeds": embeddings, "prompt_attention_mask": mask.to(embeddings.dtype)}

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = noisy.shape[-2:]
        embeddings, mask = conditioning.tensors["embeddings"], conditioning.tensors["added_mask"]
        patches = pack(noisy)
        mask = torch.cat([mask, mask.new_ones(patches.shape[:2])], dim=1).to(embeddings.dtype)
        with self._mask_in_checkpoints(mask):
            packed = self.module(
                patches,
                embeddings,
                self.timesteps(indices),
                img_ids=position_ids(height // 2, width // 2, noisy.device),
                txt_ids=noisy.new_zeros(embeddings.shape[1], 3),
                attention_mask=mask,
            ).sample
        return unpack(packed, height, width)

    @contextmanager
    def _mask_in_checkpoints(self, mask: Tensor) -> Iterator[None]:
        """Within this context the single blocks get the mask where activations are checkpointed, too: diffusers
        (0.42) leaves it out there."""
        transformer = self.pipeline.transformer
        if not transformer.gradient_checkpointing:
            yield
            return
        checkpoint = transformer._gradient_checkpointing_func
        single = set(transformer.single_transformer_blocks)

        def with_mask(block: Any, *given: Any) -> Any:
            return checkpoint(block, *given[:3], mask) if block in single else checkpoint(block, *given)

        transformer._gradient_checkpointing_func = with_mask
        try:
            yield
        finally:
            transformer._gradient_checkpointing_func = checkpoint
