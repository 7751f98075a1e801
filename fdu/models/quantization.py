"""Frozen weights in four or eight bits: the linear layers in the blocks of a model, to train adapters on.

nf4 (Dettmers et al. 2023, arXiv 2305.14314) is computed by bitsandbytes: 64 weights share a scale. In int8 and fp8 each
row has a scale. The backward pass keeps the stored weights alone, where layerwise casting would keep cast copies.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional

from fdu.models import parts

LARGEST = {"int8": 127.0, "fp8": 448.0}
"""The largest number of a kind."""
NF4_BLOCK = 64
"""Weights that share a scale in bitsandbytes' nf4."""
LARGE = 1 << 29
"""Text encoders of so many parameters are quantized as well."""


def quantize(pipeline: DiffusionPipeline, quantization: str, device: str = "cpu") -> None:
    """Quantize the denoiser of a pipeline and its large text encoders, and move what is quantized to the device.

    Args:
        pipeline: with weights of float32, float16 or bfloat16, or on the device "meta", for its shapes.
        quantization: "none", "nf4", "int8" or "fp8".
        device: where quantized layers go; others stay.
    """
    if quantization == "none":
        return
    for name, model in parts.models(pipeline).items():
        if name in parts.DENOISERS or sum(weight.numel() for weight in model.parameters()) >= LARGE:
            _quantize_blocks(model, quantization, device)


def quantization_of(pipeline: DiffusionPipeline) -> str:
    """What :func:`quantize` has made of a pipeline; "none" also for weights that others quantized."""
    layers = [layer for model in parts.models(pipeline).values() for layer in _quantized(model)]
    return layers[0].kind if layers else "none"


def is_few_bits(weight: Tensor) -> bool:
    """Whether a weight is stored in fewer bits than it is computed with, by whichever library."""
    plain = type(weight.data) is Tensor  # torchao's tensors say that they are of the dtype that they stand for
    return not plain or not weight.is_floating_point() or weight.itemsize < 2


def parameter_count(model: nn.Module) -> int:
    """The parameters of a model, of quantized layers those that are stood for."""
    stored = sum(parameter.numel() for parameter in model.parameters())
    return stored + sum(
        layer.in_features * layer.out_features - layer.stored.numel() - layer.scale.numel()
        for layer in _quantized(model)
    )


def _quantized(model: nn.Module) -> list[QuantizedLinear]:
    return [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]


def _quantize_blocks(model: nn.Module, kind: str, device: str) -> None:
    for parent_name, parent in list(model.named_modules()):
        # Layers outside of blocks are few, and what enters and leaves by them suffers most.
        if not any(part.isdigit() for part in parent_name.split(".")):
            continue
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                quantized = QuantizedLinear(layer, kind)
                setattr(parent, name, quantized if layer.weight.is_meta else quantized.to(device))


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight is stored in four or eight bits; it computes in the dtype that it had."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.dtype = layer.weight.dtype
        stored, scale = _stored(layer.weight.detach(), kind)
        self.stored, self.scale = (nn.Parameter(part, requires_grad=False) for part in (stored, scale))
        self.bias = layer.bias
        self.train(layer.training)

    @property
    def how(self) -> tuple[str, tuple[int, int], torch.dtype]:
        """The kind of what is stored, and the shape and dtype of what it stands for."""
        return self.kind, (self.out_features, self.in_features), self.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that it computes with; every call makes it again."""
        return _weight(self.stored, self.scale, *self.how)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _Product.apply(input, self.stored, self.scale, self.bias, *self.how)
        return output


class _Product(torch.autograd.Function):
    """A linear layer that keeps its stored weight for the backward pass, and nothing else."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.save_for_backward(stored, scale)
        ctx.how, ctx.dtype = how, given.dtype
        return functional.linear(given, _weight(stored, scale, *how), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        weight = _weight(*ctx.saved_tensors, *ctx.how).to(gradient.dtype)
        return (gradient @ weight).to(ctx.dtype), *[None] * 6


def _stored(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """What stands for a weight, and its scales; the stored numbers are no floats, so that no cast of a model to another
    dtype reaches them."""
    if kind == "nf4":
        if weight.is_meta:
            stored = weight.new_empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
            return stored, weight.new_empty(-(-weight.numel() // NF4_BLOCK), dtype=torch.float32)
        import bitsandbytes  # noqa: F401

        packed: tuple[Tensor, Tensor] = torch.ops.bitsandbytes.quantize_4bit(weight, NF4_BLOCK, "nf4", torch.uint8)
        return packed
    scale = (weight.float().abs().amax(1, keepdim=True) / LARGEST[kind]).to(weight.dtype)
    scale = scale.where(scale > 0, 1)
    scaled = (weight.float() / scale.float()).clamp(-LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        return scaled.round().to(torch.int8), scale
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def _weight(stored: Tensor, scale: Tensor, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight that is stored."""
    if kind == "nf4":
        if stored.is_meta:
            return stored.new_empty(shape, dtype=dtype)
        weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(stored, scale.float(), NF4_BLOCK, "nf4", shape, dtype)
        return weight
    values = stored if kind == "int8" else stored.view(torch.float8_e4m3fn)
    return values.to(dtype) * scale.to(dtype)
