"""The Gaussian loss: its kernels, with one or several programs per sample, and their launches.

A sample is walked over from an origin, which SHIFTED alignment moves down to a 16-byte boundary: its elements are the
positions lead ... lead + size - 1 from there. Positions outside are guarded, and all blocks inside are not.

``tensors``: pred, target, grad, mask (the last two may be None). ``numbers``: sigma, its stride, weight, table,
profile, count, sigma^2, and where s goes. ``scale``, of gradients: tensor, number, divisor. ``walk``: tensors, origins,
sizes, strides.

torch.sum or torch.mean reduces [B]: its launch costs the host less than one of Triton's, and its order is fixed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdu_kernels.calls import GaussianCall
from fdu_kernels.kernels.triton import tuning
from fdu_kernels.kernels.triton.layout import ALIGNED, Layout, alignment, broadcast_strides, collapse
from fdu_kernels.kernels.triton.scalars import SHIFTED, addresses, load, profile_at, store
from fdu_kernels.kernels.triton.tuning import Split

Partials = tuple[Tensor | None, Tensor | None]
NO_PARTIALS, NO_NUMBERS, NO_SCALE = (None,) * 2, (None,) * 8, (None,) * 3

PRED, TARGET, GRAD, MASK = (tl.constexpr(i) for i in range(4))
VARYING = ["size", "pred_batch", "target_batch", "grad_batch", "mask_batch", "coefficient_stride", "parts", "blocks"]
"""Integers of which no value gets a compilation of its own, as the items of tuples do."""


@triton.jit
def _origin(sample: tl.tensor, stride: tl.tensor, ALIGN: tl.constexpr, VECTOR: tl.constexpr) -> tl.tuple:
    """Where the walk over a sample begins, and how many positions later the sample does; int64."""
    origin = sample.to(tl.int64) * stride
    lead = origin - origin
    if ALIGN == SHIFTED:
        lead = origin % VECTOR
        origin = origin - lead
    if ALIGN > 0:
        origin = tl.multiple_of(origin, VECTOR)
    return origin, lead


@triton.jit
def _begin(
    sample: tl.tensor, size: tl.tensor, pred_batch: tl.tensor, target_batch: tl.tensor, grad_batch: tl.tensor,
    mask_batch: tl.tensor, DIMS: tl.constexpr, ALIGN: tl.constexpr, VECTOR: tl.constexpr, MASK_VECTOR: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """(Origins of pred, target, grad and mask, and how many positions later than the others the mask's is); the first
    position of the sample, and the one past its last."""
    pred, lead = _origin(sample, pred_batch, ALIGN, VECTOR)
    target, _ = _origin(sample, target_batch, ALIGN, VECTOR)
    grad, _ = _origin(sample, grad_batch, ALIGN, VECTOR)
    mask = sample.to(tl.int64) * mask_batch
    mask_lead = lead
    if DIMS == 0:
        if ALIGN == SHIFTED:
            mask = mask - lead
        mask_lead = lead - lead
    if ALIGN == 1:
        size = size // VECTOR * VECTOR
    return (pred, target, grad, tl.multiple_of(mask, MASK_VECTOR), mask_lead), lead, lead + size


@triton.jit
def _block(
    walk: tl.tuple, TENSOR: tl.constexpr, start: tl.tensor, BLOCK: tl.constexpr, LINEAR: tl.constexpr,
    DIMS: tl.constexpr, WIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Pointers to the block of one of the tensors that begins at ``start``."""
    tensors, begin, sizes, strides = walk
    if TENSOR == MASK:
        start -= begin[4]
        pointers = addresses(tensors[3], begin[3], start, sizes, strides[3], BLOCK, DIMS == 0, DIMS, WIDE)
    else:
        pointers = addresses(tensors[TENSOR], begin[TENSOR], start, sizes, strides[TENSOR], BLOCK, LINEAR, DIMS, WIDE)
    return pointers


@triton.jit
def _finish(total: tl.tensor, mask_total: tl.tensor, sample: tl.tensor, numbers: tl.tuple) -> tl.tuple:
    """The loss of a sample, and what its masked differences are to be multiplied by. Every program of it writes s."""
    sigma, sigma_stride, weight, table, profile, count, sigma_squared, distances = numbers
    divisor = tl.full([], 0.0, tl.float32) + count
    if mask_total is not None:
        # A count of 0 asks for the mask's sum. An empty row has s = 0/1, not 0/0.
        divisor = tl.where(count == 0.0, tl.where(mask_total == 0.0, 1.0, mask_total), divisor)
    if sigma is not None:
        deviation = tl.load(sigma + sample.to(tl.int64) * sigma_stride).to(tl.float32)
        divisor *= deviation * deviation
    else:
        divisor *= sigma_squared
    s = tl.div_rn(total, divisor)
    if distances is not None:
        tl.store(distances + sample.to(tl.int64), s.to(distances.dtype.element_ty))
    loss, slope = profile_at(s, table, profile)
    coefficient = tl.div_rn(2.0 * slope, divisor)
    if weight is not None:
        omega = tl.load(weight + sample.to(tl.int64)).to(tl.float32)
        loss *= omega
        coefficient *= omega
    return loss, coefficient


@triton.jit
def _finish_partials(
    partials: tl.tuple, sample: tl.tensor, parts: tl.tensor, numbers: tl.tuple, PARTIALS: tl.constexpr
) -> tl.tuple:
    """The same from partial sums."""
    mask_total = None
    if partials[1] is not None:
        mask_total = _partials_total(partials[1], sample, parts, PARTIALS)
    return _finish(_partials_total(partials[0], sample, parts, PARTIALS), mask_total, sample, numbers)


@triton.jit
def _partials_total(partials: tl.tensor, sample: tl.tensor, parts: tl.tensor, PARTIALS: tl.constexpr) -> tl.tensor:
    lane = tl.arange(0, PARTIALS)
    total = tl.zeros([PARTIALS], tl.float32)
    row = partials + sample.to(tl.int64) * parts
    for first in range(0, parts, PARTIALS):
        total += tl.load(row + first + lane, mask=first + lane < parts, other=0.0)
    return tl.sum(total)


@triton.jit
def _scaled(coefficient: tl.tensor, scale: tl.tuple) -> tl.tensor:
    if scale[0] is not None:
        coefficient *= tl.load(scale[0]).to(tl.float32)
    return tl.div_rn(coefficient * scale[1], tl.full([], 0.0, tl.float32) + scale[2])


@triton.jit(do_not_specialize=VARYING)
def gaussian_on_chip(
    tensors: tl.tuple, losses: tl.tensor, numbers: tl.tuple, scale: tl.tuple, size: tl.tensor, pred_batch: tl.tensor,
    target_batch: tl.tensor, grad_batch: tl.tensor, mask_batch: tl.tensor, sizes: tl.tuple, strides: tl.tuple,
    BLOCK: tl.constexpr, LINEAR: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr, VECTOR: tl.constexpr,
    MASK_VECTOR: tl.constexpr,
) -> None:  # fmt: skip
    """Losses and gradients, one program a sample, whose differences stay in registers: 3N bytes, one launch."""
    sample = tl.program_id(0)
    begin, lead, end = _begin(
        sample, size, pred_batch, target_batch, grad_batch, mask_batch, DIMS, ALIGN, VECTOR, MASK_VECTOR
    )
    walk = (tensors, begin, sizes, strides)
    lane = tl.arange(0, BLOCK)
    valid = lane < end
    if ALIGN == SHIFTED:
        valid = valid & (lane >= lead)
    start = lead - lead
    difference = load(_block(walk, PRED, start, BLOCK, LINEAR, DIMS, False), valid)
    difference -= load(_block(walk, TARGET, start, BLOCK, LINEAR, DIMS, False), valid)
    masked, mask_total = difference, None
    if tensors[3] is not None:
        factor = load(_block(walk, MASK, start, BLOCK, LINEAR, DIMS, False), valid)
        masked, mask_total = factor * difference, tl.sum(factor)
    loss, coefficient = _finish(tl.sum(masked * difference), mask_total, sample, numbers)
    tl.store(losses + sample, loss)
    store(_block(walk, GRAD, start, BLOCK, LINEAR, DIMS, False), _scaled(coefficient, scale) * masked, valid)


@triton.jit
def _add(
    sums: tl.tuple, walk: tl.tuple, start: tl.tensor, valid: tl.tensor, BLOCK: tl.constexpr, LINEAR: tl.constexpr,
    DIMS: tl.constexpr, WIDE: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The sums of squares and of the mask, with a block added."""
    difference = load(_block(walk, PRED, start, BLOCK, LINEAR, DIMS, WIDE), valid)
    difference -= load(_block(walk, TARGET, start, BLOCK, LINEAR, DIMS, WIDE), valid)
    masked, mask_sums = difference, sums[1]
    if walk[0][3] is not None:
        factor = load(_block(walk, MASK, start, BLOCK, LINEAR, DIMS, WIDE), valid)
        masked = factor * difference
        mask_sums += factor
    return sums[0] + masked * difference, mask_sums


@triton.jit(do_not_specialize=VARYING)
def gaussian_distance(
    tensors: tl.tuple, partials: tl.tuple, losses: tl.tensor, coefficients: tl.tensor, numbers: tl.tuple,
    size: tl.tensor, pred_batch: tl.tensor, target_batch: tl.tensor, mask_batch: tl.tensor, sizes: tl.tuple,
    strides: tl.tuple, parts: tl.tensor, blocks: tl.tensor, BLOCK: tl.constexpr, LINEAR: tl.constexpr,
    DIMS: tl.constexpr, ALIGN: tl.constexpr, VECTOR: tl.constexpr, MASK_VECTOR: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """Partial sums of parts of samples; without ``partials`` a part is a sample: its loss and coefficient at once."""
    program = tl.program_id(0)
    sample, part = program // parts, program % parts
    begin, lead, end = _begin(  # without a gradient
        sample, size, pred_batch, target_batch, pred_batch, mask_batch, DIMS, ALIGN, VECTOR, MASK_VECTOR
    )
    walk = (tensors, begin, sizes, strides)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = part.to(tl.int64) * blocks
    last = tl.minimum(first + blocks, (end + BLOCK - 1) // BLOCK)
    for block in range(first, last):
        start = block * BLOCK
        if (start >= lead) & (start + BLOCK <= end):
            sums = _add(sums, walk, start, None, BLOCK, LINEAR, DIMS, WIDE)
        else:
            valid = (start + lane >= lead) & (start + lane < end)
            sums = _add(sums, walk, start, valid, BLOCK, LINEAR, DIMS, WIDE)
    total, mask_total = tl.sum(sums[0]), None
    if tensors[3] is not None:
        mask_total = tl.sum(sums[1])
    if partials[0] is not None:
        tl.store(partials[0] + program, total)
        if mask_total is not None:
            tl.store(partials[1] + program, mask_total)
    else:
        loss, coefficient = _finish(total, mask_total, sample, numbers)
        tl.store(losses + sample, loss)
        tl.store(coefficients + sample, coefficient)


@triton.jit(do_not_specialize=VARYING)
def gaussian_finish(
    partials: tl.tuple, losses: tl.tensor, coefficients: tl.tensor, numbers: tl.tuple, parts: tl.tensor,
    PARTIALS: tl.constexpr,
) -> None:  # fmt: skip
    """Losses and coefficients from partial sums, one program a sample."""
    sample = tl.program_id(0)
    loss, coefficient = _finish_partials(partials, sample, parts, numbers, PARTIALS)
    tl.store(losses + sample, loss)
    tl.store(coefficients + sample, coefficient)


@triton.jit
def _write(
    coefficient: tl.tensor, walk: tl.tuple, start: tl.tensor, valid: tl.tensor, BLOCK: tl.constexpr,
    LINEAR: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of a block."""
    difference = load(_block(walk, PRED, start, BLOCK, LINEAR, DIMS, WIDE), valid)
    difference -= load(_block(walk, TARGET, start, BLOCK, LINEAR, DIMS, WIDE), valid)
    if walk[0][3] is not None:
        difference *= load(_block(walk, MASK, start, BLOCK, LINEAR, DIMS, WIDE), valid)
    store(_block(walk, GRAD, start, BLOCK, LINEAR, DIMS, WIDE), coefficient * difference, valid)


@triton.jit(do_not_specialize=VARYING)
def gaussian_gradient(
    tensors: tl.tuple, coefficients: tl.tensor, coefficient_stride: tl.tensor, partials: tl.tuple, losses: tl.tensor,
    numbers: tl.tuple, scale: tl.tuple, size: tl.tensor, pred_batch: tl.tensor, target_batch: tl.tensor,
    grad_batch: tl.tensor, mask_batch: tl.tensor, sizes: tl.tuple, strides: tl.tuple, parts: tl.tensor,
    blocks: tl.tensor, BLOCK: tl.constexpr, LINEAR: tl.constexpr, DIMS: tl.constexpr, ALIGN: tl.constexpr,
    VECTOR: tl.constexpr, MASK_VECTOR: tl.constexpr, WIDE: tl.constexpr, PARTIALS: tl.constexpr,
) -> None:  # fmt: skip
    """Gradients from given coefficients, or from partial sums; then the first part of a sample writes its loss.

    The last programs and blocks come first: what gaussian_distance has read last is the most likely to be in L2.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, part = program // parts, program % parts
    if partials[0] is not None:
        loss, coefficient = _finish_partials(partials, sample, parts, numbers, PARTIALS)
        tl.store(losses + sample, loss, mask=part == 0)
        coefficient = _scaled(coefficient, scale)
    else:
        coefficient = tl.load(coefficients + sample.to(tl.int64) * coefficient_stride)
    begin, lead, end = _begin(
        sample, size, pred_batch, target_batch, grad_batch, mask_batch, DIMS, ALIGN, VECTOR, MASK_VECTOR
    )
    walk = (tensors, begin, sizes, strides)
    lane = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * blocks
    last = tl.minimum(first + blocks, (end + BLOCK - 1) // BLOCK)
    for step in range(first, last):
        start = (first + last - 1 - step) * BLOCK
        if (start >= lead) & (start + BLOCK <= end):
            _write(coefficient, walk, start, None, BLOCK, LINEAR, DIMS, WIDE)
        else:
            valid = (start + lane >= lead) & (start + lane < end)
            _write(coefficient, walk, start, valid, BLOCK, LINEAR, DIMS, WIDE)


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
            gaussian_finish[(samples.batch,)](
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
            gaussian_on_chip[(samples.batch,)](
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
        self.extent = layout.size + (vector - 1 if self.align == SHIFTED.value and self.batch > 1 else 0)
        mask_batch = mask_strides[0] if mask_strides else 0
        # The mask's rows begin as far from a boundary as those of the data.
        even = (mask_batch - (batches[0] if layout.dims == 0 else 0)) % vector == 0
        mask_vector = vector if mask is not None and self.align and (even or self.batch == 1) else 1
        self.variant = (layout.linear, layout.dims, self.align, vector, mask_vector)
        self.walk = "strided" if not layout.linear else "linear" if mask is None else "masked"
        # pred, target, grad and mask; None for those that are not given.
        missing = 3 - len(data)
        self.tensors: tuple[Any, ...] = (*data, *[None] * missing, mask)
        self.batches = (*batches, *[0] * missing, mask_batch)
        of_mask = layout.strides[len(data)] if mask is not None else ()
        self.strides = (*layout.strides[: len(data)], *[()] * missing, of_mask)

    def split(self, one_launch: bool = False) -> Split:
        return tuning.stream(self.extent, self.batch, self.walk, self.itemsize, one_launch)

    def workspace(self, split: Split) -> Partials:
        """Memory for the partial sums of squares and of the mask."""
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
    gaussian_distance[(samples.batch * split.parts,)](
        (*tensors[:2], None, tensors[3]), partials, losses, coefficients, numbers, samples.size, *batches[:2],
        batches[3], samples.layout.sizes, (*strides[:2], (), strides[3]), split.parts, split.blocks, split.block,
        *samples.variant, samples.layout.wide, **samples.target.options(split.warps),
    )  # fmt: skip


def _write_gradient(
    samples: _Samples, split: Split, coefficients: Tensor | None, partials: Partials, losses: Tensor | None,
    numbers: tuple[Any, ...], scale: tuple[Any, ...],
) -> None:  # fmt: skip
    gaussian_gradient[(samples.batch * split.parts,)](
        samples.tensors, coefficients, None if coefficients is None else coefficients.stride(0), partials, losses,
        numbers, scale, samples.size, *samples.batches, samples.layout.sizes, samples.strides, split.parts,
        split.blocks, split.block, *samples.variant, samples.layout.wide, tuning.PARTIALS_BLOCK,
        **samples.target.options(split.warps),
    )  # fmt: skip


def _numbers(samples: _Samples, call: GaussianCall) -> tuple[Any, ...]:
    """The argument ``numbers`` of the kernels."""
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
        return (sigma.contiguous(), min(sigma.ndim, 1), *rest, None, call.s)
    return (None, None, *rest, float(sigma) * float(sigma), call.s)


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
