"""Launches of the Gaussian kernels: what they get for given tensors, and how many programs.

torch.sum or torch.mean reduces [B]: its launch costs the host less than one of Triton's, and its order is fixed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fdu_kernels.calls import GaussianCall
from fdu_kernels.kernels.triton import gaussian_kernels, tuning
from fdu_kernels.kernels.triton.layout import ALIGNED, SHIFTED, Layout, alignment, broadcast_strides, collapse
from fdu_kernels.kernels.triton.tuning import Split

Partials = tuple[Tensor | None, Tensor | None]
NO_PARTIALS, NO_NUMBERS, NO_SCALE = (None,) * 2, (None,) * 7, (None,) * 3


def gaussian_forward(call: GaussianCall) -> tuple[Tensor, Tensor]:
    """See Backend.gaussian_forward. One launch where one program takes a sample, else two."""
    samples = _Samples(call, None)
    losses, coefficients = (call.pred.new_empty(samples.batch, dtype=torch.float32) for _ in range(2))
    numbers = _numbers(samples, call)
    split = samples.split(one_launch=True)
    with launching_on(call.pred.device):
        if split.parts == 1:
            _sum_squares(samples, split, NO_PARTIALS, losses, coefficients, numbers)
        else:
            partials = samples.workspace(split)
            _sum_squares(samples, split, partials)
            gaussian_kernels.gaussian_finish[(samples.batch,)](
                partials, losses, coefficients, numbers, split.parts, tuning.PARTIALS_BLOCK,
                **samples.target.options(tuning.FINISH_WARPS),
            )  # fmt: skip
    return losses, coefficients


def gaussian_backward(call: GaussianCall, coefficient: Tensor) -> Tensor:
    """See Backend.gaussian_backward. One launch."""
    grad = torch.empty_like(call.pred)
    samples = _Samples(call, grad)
    with launching_on(call.pred.device):
        _write_gradient(samples, samples.split(), coefficient, NO_PARTIALS, None, NO_NUMBERS, NO_SCALE)
    return samples.copied_to(grad)


def gaussian_value_and_grad(call: GaussianCall, grad_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See Backend.gaussian_value_and_grad. One launch where a sample fits on chip, else two; then the reduction."""
    pred = call.pred
    grad = torch.empty_like(pred) if grad_out is None else grad_out
    samples = _Samples(call, grad)
    losses = pred.new_empty(samples.batch, dtype=torch.float32)
    numbers = _numbers(samples, call)
    scale = (*scale_on(call.grad_scale, pred.device), call.divisor)
    tabulated = call.profile.table is not None
    fitting = tuning.on_chip(samples.extent, samples.walk, samples.align == ALIGNED, tabulated)
    with launching_on(pred.device):
        if fitting is not None:
            block, warps = fitting
            gaussian_kernels.gaussian_on_chip[(samples.batch,)](
                samples.tensors, losses, numbers, scale, samples.size, *samples.batches, samples.layout.sizes,
                samples.strides, block, *samples.variant,
                **samples.target.options(warps, tuning.ON_CHIP_REGISTERS[warps]),
            )  # fmt: skip
        else:
            split = samples.split()
            partials = samples.workspace(split)
            _sum_squares(samples, split, partials)
            _write_gradient(samples, split, None, partials, losses, numbers, scale)
    return reduced(losses, call.reduction), samples.copied_to(grad)


class _Samples:
    """The tensors of one call as the kernels take them; copied where their strides need too many dimensions."""

    def __init__(self, call: GaussianCall, grad: Tensor | None) -> None:
        data = tuple(tensor for tensor in (call.pred, call.target, grad) if tensor is not None)
        shape, mask = tuple(call.pred.shape), call.mask
        mask_strides = () if mask is None else broadcast_strides(mask, shape)
        layout = _collapsed(shape, data, mask_strides)
        if layout is None:
            data = tuple(tensor.contiguous() for tensor in data)
            if mask is not None:
                mask = mask.expand(shape).contiguous()
                mask_strides = mask.stride()
            layout = _collapsed(shape, data, mask_strides)
            assert layout is not None
        self.layout, self.size, self.batch = layout, layout.size, shape[0]
        self.target = tuning.target_of(call.pred.device)
        batches = [tensor.stride(0) for tensor in data]
        sizes = [tensor.element_size() for tensor in data]
        # The smallest elements decide how many positions lie between boundaries of all tensors.
        vector, self.itemsize = 16 // min(sizes), max(sizes)
        self.align = alignment(layout, self.batch, batches, [tensor.data_ptr() for tensor in data], vector)
        self.extent = layout.size + (vector - 1 if self.align == SHIFTED and self.batch > 1 else 0)
        mask_batch = mask_strides[0] if mask_strides else 0
        # The mask's rows begin as far from a boundary as those of the data.
        even = (mask_batch - (batches[0] if layout.dims == 0 else 0)) % vector == 0
        mask_vector = vector if mask is not None and self.align and (even or self.batch == 1) else 1
        self.variant = (layout.linear, layout.dims, self.align, vector, mask_vector)
        self.walk = "strided" if not layout.linear else "linear" if mask is None else "masked"
        # Of pred, target, grad and mask, whichever there are.
        missing = 3 - len(data)
        self.tensors: tuple[Any, ...] = (*data, *[None] * missing, mask)
        self.batches = (*batches, *[0] * missing, mask_batch)
        of_mask = layout.strides[len(data)] if mask is not None else ()
        self.strides = (*layout.strides[: len(data)], *[()] * missing, of_mask)

    def split(self, one_launch: bool = False) -> Split:
        return tuning.stream(self.extent, self.batch, self.walk, self.itemsize, one_launch)

    def workspace(self, split: Split) -> Partials:
        """For the partial sums of squares, and of the mask."""
        masked = self.tensors[3] is not None
        rows = self.tensors[0].new_empty((1 + masked, self.batch * split.parts), dtype=torch.float32)
        return rows[0], rows[1] if masked else None

    def copied_to(self, grad: Tensor) -> Tensor:
        """The gradient in the tensor it was asked for in."""
        return grad if grad is self.tensors[2] else grad.copy_(self.tensors[2])


def _collapsed(shape: tuple[int, ...], data: tuple[Tensor, ...], mask_strides: tuple[int, ...]) -> Layout | None:
    others = (mask_strides[1:],) if mask_strides else ()
    return collapse(shape[1:], tuple(tensor.stride()[1:] for tensor in data), others)


def _sum_squares(
    samples: _Samples, split: Split, partials: Partials, losses: Tensor | None = None,
    coefficients: Tensor | None = None, numbers: tuple[Any, ...] = NO_NUMBERS,
) -> None:  # fmt: skip
    tensors, batches, strides = samples.tensors, samples.batches, samples.strides
    gaussian_kernels.gaussian_distance[(samples.batch * split.parts,)](
        (*tensors[:2], None, tensors[3]), partials, losses, coefficients, numbers, samples.size, *batches[:2],
        batches[3], samples.layout.sizes, (*strides[:2], (), strides[3]), split.parts, split.blocks, split.block,
        *samples.variant, samples.layout.wide, **samples.target.options(split.warps),
    )  # fmt: skip


def _write_gradient(
    samples: _Samples, split: Split, coefficients: Tensor | None, partials: Partials, losses: Tensor | None,
    numbers: tuple[Any, ...], scale: tuple[Any, ...],
) -> None:  # fmt: skip
    gaussian_kernels.gaussian_gradient[(samples.batch * split.parts,)](
        samples.tensors, coefficients, None if coefficients is None else coefficients.stride(0), partials, losses,
        numbers, scale, samples.size, *samples.batches, samples.layout.sizes, samples.strides, split.parts,
        split.blocks, split.block, *samples.variant, samples.layout.wide, tuning.PARTIALS_BLOCK,
        **samples.target.options(split.warps),
    )  # fmt: skip


def _numbers(samples: _Samples, call: GaussianCall) -> tuple[Any, ...]:
    """In the order of gaussian_kernels.py."""
    profile, sigma = call.profile, call.sigma
    count = 1.0
    if call.distance == "mean":
        # 0 asks for the mask's sum.
        count = float(max(samples.size, 1)) if call.mask is None else 0.0
    c, k = float(profile.c), float(profile.k)
    profile_numbers = (c, k, c / k if k else 0.0, float(profile.linear_beyond))
    weight = None if call.weight is None else call.weight.contiguous()
    rest = (weight, profile.table_on(call.pred.device), profile_numbers, count)
    if isinstance(sigma, Tensor):
        return (sigma.contiguous(), min(sigma.ndim, 1), *rest, None)
    return (None, None, *rest, float(sigma) * float(sigma))


def scale_on(grad_scale: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """grad_scale as a tensor on the device and a number, whose product it is."""
    if isinstance(grad_scale, Tensor) and grad_scale.device == device:
        return grad_scale, 1.0
    # A tensor on the CPU, beside tensors on a GPU: reading it makes nobody wait.
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
