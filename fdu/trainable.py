"""What is trained: LoRA adapters or the cross-attention key and value projections, and the frozen model beside them.

Frozen and trained model share one backbone. The frozen one is the same module with the adapters off, or with the
original projections swapped in, so it costs no copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn

from fdu.config import EraseConfig
from fdu.denoiser import UNetDenoiser

ADAPTER_NAME = "fdu"


class Trainable(Protocol):
    """What the erase loop needs of a training method."""

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters, fp32."""

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this context the module computes what it did before the erasure."""

    def finish(self) -> None:
        """End the training: no more gradients."""

    def remove(self) -> None:
        """Undo everything: the module computes what it did before."""

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        """Write the result so that plain diffusers loads it."""


class LoRA:
    """Low-rank adapters on the context projections (Hu et al. 2022, arXiv 2106.09685), through peft."""

    def __init__(self, denoiser: UNetDenoiser, config: EraseConfig) -> None:
        self.module = denoiser.module
        targets = [name for name, _ in self.module.named_modules() if name.endswith(denoiser.context_projections)]
        self.module.requires_grad_(False)
        self.module.add_adapter(
            LoraConfig(
                r=config.rank, lora_alpha=config.lora_alpha, target_modules=targets, init_lora_weights="gaussian"
            ),
            adapter_name=ADAPTER_NAME,
        )
        # fp32 also beside a half-precision model: peft casts what flows through them.
        cast_training_params(self.module, dtype=torch.float32)
        self.layers = [layer for layer in self.module.modules() if isinstance(layer, BaseTunerLayer)]
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        return self.trained

    @contextmanager
    def frozen(self) -> Iterator[None]:
        training = [parameter.requires_grad for parameter in self.trained]
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)
            # Enabling an adapter makes peft train it again.
            for parameter, trains in zip(self.trained, training, strict=True):
                parameter.requires_grad_(trains)

    def _enable(self, enabled: bool) -> None:
        for layer in self.layers:
            layer.enable_adapters(enabled)

    def finish(self) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(False)

    def remove(self) -> None:
        self.module.unload_lora()

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(self.module, adapter_name=ADAPTER_NAME))
        pipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=self._metadata())

    def _metadata(self) -> dict[str, object]:
        config = self.module.peft_config[ADAPTER_NAME]
        return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}


class CrossAttention:
    """The key and value projections of cross-attention themselves; the result is a full pipeline."""

    def __init__(self, denoiser: UNetDenoiser, config: EraseConfig) -> None:
        module = denoiser.module
        module.requires_grad_(False)
        self.dtype = module.dtype
        self.trained = [
            parameter
            for name, layer in module.named_modules()
            if name.endswith(denoiser.context_projections)
            for parameter in layer.parameters()
        ]
        self.originals = [parameter.detach().clone() for parameter in self.trained]
        for parameter in self.trained:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()

    def parameters(self) -> list[nn.Parameter]:
        return self.trained

    @contextmanager
    def frozen(self) -> Iterator[None]:
        current = [parameter.data for parameter in self.trained]
        for parameter, original in zip(self.trained, self.originals, strict=True):
            parameter.data = original
        try:
            yield
        finally:
            for parameter, data in zip(self.trained, current, strict=True):
                parameter.data = data

    def finish(self) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(self.dtype)

    def remove(self) -> None:
        for parameter, original in zip(self.trained, self.originals, strict=True):
            parameter.requires_grad_(False)
            parameter.data = original

    def save(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        pipeline.save_pretrained(folder)


def attach(denoiser: UNetDenoiser, config: EraseConfig) -> Trainable:
    """Make the part of the denoiser that ``config.train_method`` names trainable, everything else frozen."""
    methods: dict[str, type[LoRA] | type[CrossAttention]] = {"lora": LoRA, "cross_attention": CrossAttention}
    return methods[config.train_method](denoiser, config)
