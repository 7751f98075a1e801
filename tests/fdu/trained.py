"""Pipelines as after a training, without one: random adapters, random new weights, and what a pipeline computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from families import RESOLUTION, resolution
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from fdu.models import parts
from fdu.models.families import denoiser_of

Layers = dict[str, dict[str, Tensor]]
Changes = dict[str, tuple[Tensor, Tensor]]
CONTEXT = {
    "sd": ("attn2.to_k", "attn2.to_v"),
    "sdxl": ("attn2.to_k", "attn2.to_v"),
    "sd3": ("attn.add_k_proj", "attn.add_v_proj"),
    "flux": ("attn.add_k_proj", "attn.add_v_proj"),
    "sana": ("attn2.to_k", "attn2.to_v"),
}
"""The layers that the context projections of each family are."""
RANK, ALPHA = 3, 6.0


def denoiser(pipeline: DiffusionPipeline) -> nn.Module:
    return getattr(pipeline, parts.denoiser_name(pipeline))


@torch.no_grad()
def output(pipeline: DiffusionPipeline, name: str) -> Tensor:
    """What the denoiser predicts for a fixed input and prompt."""
    model = denoiser_of(pipeline, resolution(name) if name in ("flux", *RESOLUTION) else None)
    noisy = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return model.predict(noisy, torch.tensor([400]), model.encode(["a photo of the digit three"]))


def add_adapter(
    pipeline: DiffusionPipeline, attribute: str, endings: Sequence[str], dora: bool = False, adapter_name: str = "fdu"
) -> dict[str, Tensor]:
    """A random adapter on the layers with these endings; returns its tensors in peft's names."""
    model = getattr(pipeline, attribute)
    names = [
        name
        for name, layer in parts.layers(model).items()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and f".{name}".endswith(tuple(f".{ending}" for ending in endings))
    ]
    assert names
    model.requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, use_dora=dora)
    model.add_adapter(config, adapter_name=adapter_name)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in name:
            parameter.requires_grad_(False)
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * (1 + 0.3 * noise) if "magnitude" in name else 0.3 * noise)
    model.eval()
    return get_peft_model_state_dict(model, adapter_name=adapter_name)


def change_weights(pipeline: DiffusionPipeline, attribute: str, endings: Sequence[str]) -> Changes:
    """New weights of the layers with these endings; returns those before and after."""
    generator = torch.Generator().manual_seed(3)
    changes = {}
    for name, parameter in getattr(pipeline, attribute).named_parameters():
        if name.removesuffix(".weight").endswith(tuple(endings)):
            before = parameter.detach().clone()
            parameter.data = before + 0.3 * torch.randn(before.shape, generator=generator).to(before)
            changes[f"{attribute}.{name}"] = (before, parameter.detach().clone())
    assert changes
    return changes


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
