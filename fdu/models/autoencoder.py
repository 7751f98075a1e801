"""Images to latents: a pipeline's VAE, with the scale and shift that its denoiser expects."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_images(vae: Any, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Clean latents, fp32 [N, C, h, w], of images [N, 3, H, W] in [0, 1]; drawn from a KL autoencoder's posterior.

    Raises:
        TypeError: images are not a floating-point tensor.
        ValueError: images are not [N, 3, H, W], or not in [0, 1].
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor in [0, 1], got {kind}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [N, 3, H, W], got {list(images.shape)}")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"images must be in [0, 1], got [{images.min():.3g}, {images.max():.3g}]")
    dtype, config = vae.dtype, vae.config
    overflows = dtype == torch.float16 and config.get("force_upcast", False)
    if overflows:
        vae.to(torch.float32)
    try:
        encoded = vae.encode((2 * images - 1).to(vae.device, vae.dtype))
        latents = (encoded.latent_dist.sample(generator) if "latent_dist" in encoded else encoded[0]).float()
    finally:
        if overflows:
            vae.to(dtype)
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None or deviation is None:
        return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    mean, deviation = (latents.new_tensor(channels).view(1, -1, 1, 1) for channels in (mean, deviation))
    return (latents - mean) * config.scaling_factor / deviation
