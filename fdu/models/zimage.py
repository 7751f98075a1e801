"""Z-Image: a transformer of a single stream that reads Qwen3 through two blocks of the text's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from fdu.models import kohya_names
from fdu.models.denoiser import Conditioning
from fdu.models.noise_schedules import FlowDenoiser

REFINERS = ("context_refiner.0", "context_refiner.1")
"""The blocks that read text alone."""
TURBO_SHIFT = 3.0
"""The shift of the scheduler of Z-Image Turbo, whose folder differs in nothing else."""


class ZImageDenoiser(FlowDenoiser):
    """A ZImageTransformer2DModel, which predicts x_0 - epsilon, and whose time is 1 at the clean image.

    It takes images and prompts as lists. Its pipeline counts guidance from 0: its scale s is 1 + s elsewhere.
    """

    family = "Z-Image (a ZImageTransformer2DModel)"
    module_class = ZImageTransformer2DModel
    kohya = kohya_names.Z_IMAGE
    unguided_scale = 0.0
    asks_for_negative = True
    # Behind the refiners every block projects text and image by one to_k and to_v.
    context_projections = tuple(f"{block}.attention.{part}" for block in REFINERS for part in ("to_k", "to_v"))
    other_readers = ("cap_embedder.1",)  # all of the text enters by it
    text_inputs: ClassVar = {"embeddings": other_readers}

    @property
    def few_steps(self) -> str | None:
        if self.pipeline.scheduler.config.get("shift") == TURBO_SHIFT:
            return f"its scheduler has shift {TURBO_SHIFT:g}, as that of Z-Image Turbo; that of Z-Image has 6"
        return super().few_steps

    @property
    def native_size(self) -> tuple[int, int] | None:
        return 1024, 1024  # the pipeline's, whose model states none

    @property
    def size_unit(self) -> int:
        return super().size_unit * self.token_side

    @property
    def token_side(self) -> int:
        return 2  # the default of the module's call

    def told_timesteps(self) -> Tensor:
        return 1 - self.noise

    def tokens(self, prompts: Sequence[str]) -> list[list[Sequence[int]]]:
        told = [
            self.pipeline.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for prompt in prompts
        ]
        return super().tokens(told)

    def encode_batch(self, prompts: list[str]) -> Conditioning:
        # The pipeline writes into the list of prompts.
        read, _ = self.pipeline.encode_prompt(list(prompts), device=self.text_device, do_classifier_free_guidance=False)
        return Conditioning.cat(
            [
                Conditioning(
                    {
                        "embeddings": embeddings[None],
                        "mask": torch.ones(1, len(embeddings), dtype=torch.long, device=embeddings.device),
                    }
                )
                for embeddings in read
            ]
        )

    def prompt_arguments(self, conditioning: Conditioning) -> dict[str, Any]:
        return {"prompt_embeds": self._listed(conditioning)}

    def read_by_inputs(self, name: str, tensor: Tensor) -> Tensor:
        return self.pipeline.transformer.cap_embedder[0](tensor)

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return torch.stack(list(args[0]))[:, :, 0], args[1]

    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        images = list(noisy[:, :, None])
        output = self.module(images, self.timesteps(indices), self._listed(conditioning)).sample
        return -torch.stack(list(output))[:, :, 0]

    def _listed(self, conditioning: Conditioning) -> list[Tensor]:
        """The embeddings of each prompt, without padding."""
        lengths = conditioning.tensors["mask"].sum(1).tolist()
        embeddings = conditioning.tensors["embeddings"]
        return [one[:length] for one, length in zip(embeddings, lengths, strict=True)]
