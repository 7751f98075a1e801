"""Launches of the Gaussian kernels: what they get for given tensors, and how many programs.

The reduction over the batch is left to torch.sum or torch.mean over [B]: its launch costs the host less than one of
Triton's, and its order is fixed. For one sample there is none.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fdu_kernels.calls import GaussianCall
from fdu_kernels.kernels.triton import tuning
from fdu_kernels.kernels.triton.gaussian_kernels import (
    gaussian_distance,
    gaussian_finish,
    gaussian_gradient,
    gaussian_on_chip,
)
from fdu_kernels.kernels.triton.layout import ALIGNED, SHIFTED, Layout, alignment, broadcast_strides, collapse
from fdu_kernels.kernels.triton.tuning import Split

NO_NUMBERS = (None,) * 8


def gaussian_forward(call: GaussianCall) -> tuple[Tensor, Tensor]:
    """See Backend.gaussian_forward. One launch where one program takes a sample, else two."""
    samples = _Samples((call.pred, call.target), call.mask)
    losses, coefficients = (call.pred.new_empty(samples.batch, dtype=torch.float32) for _ in range(2))
    numbers = _numbers(samples, call)
    split = samples.split(one_launch=True)
    with launching_on(call.pred.device):
        if split.parts == 1:
            _sum_squares(samples, split, (None, None), losses, coefficients, numbers)
        else:
            partials = samples.workspace(split)
            _sum_squares(samples, split, partials, None, None, NO_NUMBERS)
            gaussian_finish[(samples.batch,)](
                *partials, losses, coefficients, *numbers, split.parts, tuning.PARTIALS_BLOCK,
                **samples.target.options(tuning.FINISH_WARPS),
            )  # fmt: skip
    return losses, coefficients


def gaussian_backward(call: GaussianCall, coefficient: Tensor) -> Tensor:
    """See Backend.gaussian_backward. One launch."""
    grad = torch.empty_like(call.pred)
    samples = _Samples((call.pred, call.target, grad), call.mask)
    with launching_on(call.pred.device):
        _write_gradient(
            samples, samples.split(), coefficient, coefficient.stride(0), (None, None), None, NO_NUMBERS, (None,) * 3
        )
    return samples.copied_to(grad)


def gaussian_value_and_grad(call: GaussianCall, grad_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """See Backend.gaussian_value_and_grad. One launch where a sample fits on chip, else two; then the reduction."""
    pred = call.pred
    grad = torch.empty_like(pred) if grad_out is None else grad_out
    samples = _Samples((pred, call.target, grad), call.mask)
    losses = pred.new_empty(samples.batch, dtype=torch.float32)
    numbers = _numbers(samples, call)
    scale = (*scale_on(call.grad_scale, pred.device), call.divisor)
    fitting = samples.on_chip(call.profile.table is not None)
    with launching_on(pred.device):
        if fitting is not None:
            block, warps = fitting
            gaussian_on_chip[(samples.batch,)](
                *samples.data, samples.mask, losses, *numbers, *scale, *samples.walk, block, *samples.variant,
                **samples.target.options(warps, tuning.ON_CHIP_REGISTERS[warps]),
            )  # fmt: skip
        else:
            split = samples.split()
            partials = samples.workspace(split)
            _sum_squares(samples, split, partials, None, None, NO_NUMBERS)
            _write_gradient(samples, split, None, None, partials, losses, numbers, scale)
    return reduced(losses, call.reduction), samples.copied_to(grad)


class _Samples:
    """The tensors of one call as the kernels take them; copied where their strides need too many dimensions."""

    def __init__(self, data: tuple[Tensor, ...], mask: Tensor | None) -> None:
        shape = tuple(data[0].shape)
        mask_strides = () if mask is None else broadcast_strides(mask, shape)
        layout = _collapsed(shape, data, mask_strides)
        if layout is None:
            data = tuple(tensor.contiguous() for tensor in data)
            if mask is not None:
                mask = mask.expand(shape).contiguous()
                mask_strides = mask.stride()
            layout = _collapsed(shape, data, mask_strides)
            assert layout is not None
        self.data, self.mask, self.layout = data, mask, layout
        self.target = tuning.target_of(data[0].device)
        self.batch = shape[0]
        strides = [tensor.stride(0) for tensor in data]
        sizes = [tensor.element_size() for tensor in data]
        vector, self.itemsize = 16 // min(sizes), max(sizes)
        addresses = [tensor.data_ptr() for tensor in data]
        align = alignment(layout, self.batch, strides, addresses, vector)
        self.extent = layout.size + (vector - 1 if align == SHIFTED and self.batch > 1 else 0)
        mask_vector, mask_stride = 1, 0
        if mask is not None:
            mask_stride = mask_strides[0]
            # The mask's rows begin as far from a boundary as those of the data.
            even = (mask_stride - (strides[0] if layout.dims == 0 else 0)) % vector == 0
            mask_vector = vector if align and (even or self.batch == 1) else 1
        self.kind = "linear" if mask is None else "masked"
        if not layout.linear:
            self.kind = "strided"
        tensor_strides = layout.strides if mask is not None else (*layout.strides, ())
        self.walk = (layout.size, *strides, mask_stride, layout.sizes, *tensor_strides)
        self.variant = (layout.linear, layout.dims, align, vector, mask_vector)

    def split(self, one_launch: bool = False) -> Split:
        return tuning.stream(self.extent, self.batch, self.kind, self.itemsize, one_launch)

    def on_chip(self, tabulated: bool) -> tuple[int, int] | None:
        aligned = self.variant[2] == ALIGNED
        return tuning.on_chip(self.extent, self.kind, self.itemsize, aligned, tabulated)

    def workspace(self, split: Split) -> tuple[Tensor, Tensor | None]:
        """For the partial sums of squares, and of the mask."""
        rows = self.data[0].new_empty((1 if self.mask is None else 2, self.batch * split.parts), dtype=torch.float32)
        return rows[0], None if self.mask is None else rows[1]

    def copied_to(self, grad: Tensor) -> Tensor:
        """The gradient in the tensor it was asked for in."""
        return grad if grad is self.data[2] else grad.copy_(self.data[2])


def _collapsed(shape: tuple[int, ...], data: tuple[Tensor, ...], mask_strides: tuple[int, ...]) -> Layout | None:
    others = (mask_strides[1:],) if mask_strides else ()
    return collapse(shape[1:], tuple(tensor.stride()[1:] for tensor in data), others)


def _sum_squares(
    samples: _Samples,
    split: Split,
    partials: tuple[Tensor | None, Tensor | None],
    losses: Tensor | None,
    coefficients: Tensor | None,
    numbers: tuple[Any, ...],
) -> None:
    size, pred_batch, target_batch, *rest = samples.walk
    if len(samples.data) == 3:
        # gaussian_distance does not know of a gradient.
        _, mask_batch, sizes, pred_strides, target_strides, _, mask_strides = rest
        rest = [mask_batch, sizes, pred_strides, target_strides, mask_strides]
    gaussian_distance[(samples.batch * split.parts,)](
        *samples.data[:2], samples.mask, *partials, losses, coefficients, *numbers, size, pred_batch, target_batch,
        *rest, split.parts, split.blocks, split.block, *samples.variant, samples.layout.wide,
        **samples.target.options(split.warps),
    )  # fmt: skip


def _write_gradient(
    samples: _Samples,
    split: Split,
    coefficients: Tensor | None,
    coefficient_stride: int | None,
    partials: tuple[Tensor | None, Tensor | None],
    losses: Tensor | None,
    numbers: tuple[Any, ...],
    scale: tuple[Any, ...],
) -> None:
    gaussian_gradient[(samples.batch * split.parts,)](
        *samples.data, samples.mask, coefficients, coefficient_stride, *partials, losses, *numbers, *scale,
        *samples.walk, split.parts, split.blocks, split.block, *samples.variant, samples.layout.wide,
        tuning.PARTIALS_BLOCK, **samples.target.options(split.warps),
    )  # fmt: skip


def _numbers(samples: _Samples, call: GaussianCall) -> tuple[Any, ...]:
    """sigma, weight, table, profile, count, sigma_squared, sigma_stride, weight_stride."""
    profile, sigma, weight = call.profile, call.sigma, call.weight
    c, k = float(profile.c), float(profile.k)
    count = 1.0
    if call.distance == "mean":
        # 0 asks for the mask's sum.
        count = float(max(samples.layout.size, 1)) if samples.mask is None else 0.0
    numbers = (c, k, c / k if k else 0.0, float(profile.linear_beyond))
    table = profile.table_on(samples.data[0].device)
    weight_stride = None if weight is None else weight.stride(0)
    if isinstance(sigma, Tensor):
        sigma_stride = sigma.stride(0) if sigma.ndim else 0
        return sigma, weight, table, numbers, count, None, sigma_stride, weight_stride
    return None, weight, table, numbers, count, float(sigma) * float(sigma), None, weight_stride


def scale_on(grad_scale: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """grad_scale as a tensor on the device and a number, whose product it is."""
    if not isinstance(grad_scale, Tensor):
        return None, float(grad_scale)
    if grad_scale.device == device:
        return grad_scale, 1.0
    # On the CPU, beside tensors on a GPU: reading it makes nobody wait.
    return None, float(grad_scale)


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """[B] -> [B] for "none", else []."""
    if reduction == "none":
        return losses
    if len(losses) == 1:
        return losses.reshape(())
    return losses.mean() if reduction == "mean" else losses.sum()


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type not in ("cuda", "xpu"):  # interpreted
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return contextlib.nullcontext() if device.index == module.current_device() else module.device(device)
