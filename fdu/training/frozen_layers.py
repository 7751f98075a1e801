"""Frozen layers that keep for the backward pass only what the gradient of their input needs.

PyTorch's convolution keeps its input, which only the gradient of its weight needs. The gated unit of a transformer
block keeps the activated gate, which its projection can give again. Outputs and gradients keep all bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input


@contextmanager
def keeping_less(module: nn.Module) -> Iterator[None]:
    """Within this context the convolutions and gated units of ``module`` keep less for the backward pass.

    Trained convolutions, calls without gradients, and subclasses, which may compute something else, stay as they are.
    For eager execution; a compiler decides itself.
    """
    changed: list[tuple[nn.Module, str]] = []
    try:
        for part in module.modules():
            replacement: Callable[..., Tensor]
            if type(part) is nn.Conv2d and part.padding_mode == "zeros" and not isinstance(part.padding, str):
                name, replacement = "_conv_forward", _convolve(part)
            elif type(part) is GEGLU:
                name, replacement = "forward", _gate(part)
            else:
                continue
            if name not in vars(part):
                vars(part)[name] = replacement
                changed.append((part, name))
        yield
    finally:
        for part, name in changed:
            del vars(part)[name]


def _convolve(layer: nn.Conv2d) -> Callable[..., Tensor]:
    plan: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def convolve(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if trains or not (images.requires_grad and torch.is_grad_enabled()):
            return functional.conv2d(images, weight, bias, *plan)
        output: Tensor = _Convolution.apply(images, weight, bias, *plan)
        return output

    return convolve


def _gate(layer: GEGLU) -> Callable[..., Tensor]:
    plain = layer.forward

    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or states.device.type not in ("cpu", "cuda", "meta"):
            result: Tensor = plain(states, *args, **kwargs)
            return result
        projected = layer.proj(states)
        output: Tensor = _Gate.apply(projected)
        return output

    return forward


class _Convolution(torch.autograd.Function):
    """A convolution that keeps its weight alone."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, *plan: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.plan = images.shape, plan
        return functional.conv2d(images, weight, bias, *plan)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (weight,) = ctx.saved_tensors
        # Autocast computed the output, and so its gradient, in another type.
        images = conv2d_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.plan)
        return images, None, None, None, None, None, None


class _Gate(torch.autograd.Function):
    """value * gelu(gate) of a projection [..., 2 N] that holds both, keeping the projection alone."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        value, gate = projected.chunk(2, dim=-1)
        return value * functional.gelu(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        value, gate = ctx.saved_tensors[0].chunk(2, dim=-1)
        of_gate = torch.ops.aten.gelu_backward(gradient * value, gate)
        return torch.cat([gradient * functional.gelu(gate), of_gate], dim=-1)
