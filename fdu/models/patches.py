"""Rectified flow over 2x2 patches of the latents, as FLUX.1 and the models after it have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdu.models.noise_schedules import FlowDenoiser


class PatchFlowDenoiser(FlowDenoiser):
    """A transformer whose pipeline packs the latents into patches; what is packed for it is unpacked again here.

    It is told sigma itself. Its pipeline knows the native size.
    """

    packing = 2

    @property
    def native_size(self) -> tuple[int, int] | None:
        side = self.pipeline.default_sample_size * self.pixels_per_latent
        return side, side

    def unpacked(self, latents: Tensor) -> Tensor:
        return unpack(latents, *self.latent_shape[-2:])

    def told_timesteps(self) -> Tensor:
        return self.noise


def pack(latents: Tensor) -> Tensor:
    """Patches [N, (H/2) (W/2), 4 C] of latents [N, C, H, W]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Latents [N, C, H, W] of patches [N, (H/2) (W/2), 4 C]."""
    return F.pixel_shuffle(packed.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def position_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(0, row, column) of every patch, [rows * columns, 3]."""
    return torch.cartesian_prod(*(torch.arange(float(count), device=device) for count in (1, rows, columns)))
