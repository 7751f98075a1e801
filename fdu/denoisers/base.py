"""What the training needs of a denoiser: encode prompts, draw and noise latents, predict. One subclass a family.

The loop talks to this interface only, so it never asks which family of models it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
ENCODE_BATCH = 64
"""Prompts encoded at a time where no gradient is asked for."""


class Conditioning:
    """What a denoiser reads beside x_t and t, for N prompts: named tensors, each [N, ...]."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, chosen: Tensor | slice) -> Conditioning:
        """The prompts at indices [M] or in a slice."""
        return Conditioning({name: tensor[chosen] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> Conditioning:
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The prompts of all parts, in order."""
        names = parts[0].tensors
        return Conditioning({name: torch.cat([part.tensors[name] for part in parts]) for name in names})


class Denoiser(ABC):
    """The denoiser behind a pipeline, on a grid of T training timesteps, noisiest last.

    x_t = signal[i] x_0 + noise[i] epsilon at index i of the grid, for every family: sqrt(abar) and sqrt(1 - abar) in
    diffusion, 1 - sigma and sigma in rectified flow.
    """

    family: ClassVar[str]
    """The name that users know."""
    module_name: ClassVar[Literal["unet", "transformer"]]
    """The pipeline's attribute that holds the module."""
    context_projections: ClassVar[tuple[str, ...]]
    """Name endings of the linear layers of the module that read the prompt (keys and values, as a rule)."""
    attention_projections: ClassVar[tuple[str, ...]]
    """Name endings of all linear layers of attention."""

    signal: Tensor
    """[T] float32."""
    noise: Tensor
    """[T] float32."""
    prediction_type: PredictionType
    """What the module predicts."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.module: nn.Module = getattr(pipeline, self.module_name)
        """What predicts; the training may put a wrapper of it here."""

    @staticmethod
    @abstractmethod
    def fits(pipeline: DiffusionPipeline) -> bool:
        """Whether the pipeline is of this family."""

    @abstractmethod
    def encode_batch(self, prompts: list[str]) -> Conditioning:
        """The conditioning of prompts; differentiable in the text encoders."""

    @abstractmethod
    def predict(self, noisy: Tensor, indices: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output [N, C, H, W] for x_t [N, C, H, W] at indices [N] of the grid."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The pipeline's text encoders by attribute."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        found = {name: getattr(self.pipeline, name, None) for name in names}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of any number of prompts, a constant."""
        starts = range(0, len(prompts), ENCODE_BATCH)
        return Conditioning.cat([self.encode_batch(list(prompts[start : start + ENCODE_BATCH])) for start in starts])

    @torch.no_grad()
    def draw_latents(
        self, prompts: Sequence[str], steps: int, guidance_scale: float, seeds: Sequence[int], batch_size: int
    ) -> Tensor:
        """Sample a clean latent a prompt, fp32 [N, C, H, W]; it depends on its prompt and its seed alone."""
        batches = []
        settings = getattr(self.pipeline, "_progress_bar_config", {})
        self.pipeline.set_progress_bar_config(disable=True)
        try:
            for start in tqdm(range(0, len(prompts), batch_size), desc="latents", unit="batch"):
                batch = list(prompts[start : start + batch_size])
                generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
                # Half precision would round the noise away at the first timesteps.
                batches.append(self.sample(batch, steps, guidance_scale, generators).float())
        finally:
            self.pipeline._progress_bar_config = settings
        return torch.cat(batches)

    def sample(
        self, prompts: list[str], steps: int, guidance_scale: float, generators: list[torch.Generator]
    ) -> Tensor:
        """Clean latents [N, C, H, W] of one batch, by the pipeline's own sampler, without decoding them."""
        return self.pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="latent",
        ).images

    def add_noise(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """x_t [N, C, H, W] from clean latents, noise epsilon and indices [N]."""
        signal, level = self._at(indices, latents)
        return signal * latents + level * noise

    def true_output(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """What a denoiser that knew x_0 and epsilon would predict, [N, C, H, W]."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type == "flow":
            return noise - latents
        signal, level = self._at(indices, latents)
        return signal * noise - level * latents

    def _at(self, indices: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """signal and noise of indices [N], shaped to multiply ``like`` [N, ...]."""
        shape = (-1, *[1] * (like.ndim - 1))
        self.signal, self.noise = self.signal.to(like.device), self.noise.to(like.device)
        return self.signal[indices].view(shape).to(like.dtype), self.noise[indices].view(shape).to(like.dtype)
