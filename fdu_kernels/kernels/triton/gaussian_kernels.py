"""The Gaussian kernels: squared distances, profiles and gradients, one or several programs a sample.

A sample is walked over from ``origin``, which SHIFTED alignment moves down to a 16-byte boundary: its elements are the
positions lead ... lead + size - 1 from there. Positions outside are guarded, and all blocks inside are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdu_kernels.kernels.triton.scalars import SHIFTED, addresses, load, profile_at, store


@triton.jit
def _origin(
    sample: tl.tensor, stride: tl.tensor, ALIGN: tl.constexpr, VECTOR: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
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
def _mask_origin(
    sample: tl.tensor,
    stride: tl.tensor,
    lead: tl.tensor,
    DIMS: tl.constexpr,
    ALIGN: tl.constexpr,
    MASK_VECTOR: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the walk over a sample's mask begins, and how many positions later than that over the sample."""
    origin = sample.to(tl.int64) * stride
    if DIMS == 0:
        if ALIGN == SHIFTED:
            origin = origin - lead
        lead = lead - lead
    return tl.multiple_of(origin, MASK_VECTOR), lead


@triton.jit
def _finish(
    total: tl.tensor,
    mask_total: tl.tensor,
    sample: tl.tensor,
    sigma: tl.tensor,
    weight: tl.tensor,
    table: tl.tensor,
    profile: tl.tuple,
    count: tl.tensor,
    sigma_squared: tl.tensor,
    sigma_stride: tl.tensor,
    weight_stride: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """The loss of a sample, and what its masked differences are to be multiplied by."""
    divisor = tl.full([], 0.0, tl.float32) + count
    if mask_total is not None:
        # A count of 0 asks for the mask's sum. An empty row has s = 0/1, not 0/0.
        divisor = tl.where(count == 0.0, tl.where(mask_total == 0.0, 1.0, mask_total), divisor)
    if sigma is not None:
        deviation = tl.load(sigma + sample.to(tl.int64) * sigma_stride).to(tl.float32)
        divisor *= deviation * deviation
    else:
        divisor *= sigma_squared
    loss, slope = profile_at(tl.div_rn(total, divisor), table, profile)
    coefficient = tl.div_rn(2.0 * slope, divisor)
    if weight is not None:
        omega = tl.load(weight + sample.to(tl.int64) * weight_stride).to(tl.float32)
        loss *= omega
        coefficient *= omega
    return loss, coefficient


@triton.jit
def _scaled(coefficient: tl.tensor, scale: tl.tensor, grad_scale: tl.tensor, grad_divisor: tl.tensor) -> tl.tensor:
    if scale is not None:
        coefficient *= tl.load(scale).to(tl.float32)
    return tl.div_rn(coefficient * grad_scale, tl.full([], 0.0, tl.float32) + grad_divisor)


@triton.jit
def _partials_total(partials: tl.tensor, sample: tl.tensor, parts: tl.tensor, PARTIALS: tl.constexpr) -> tl.tensor:
    lane = tl.arange(0, PARTIALS)
    total = tl.zeros([PARTIALS], tl.float32)
    row = partials + sample.to(tl.int64) * parts
    for first in range(0, parts, PARTIALS):
        total += tl.load(row + first + lane, mask=first + lane < parts, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=[
    "pred_batch", "target_batch", "grad_batch", "mask_batch", "size", "sigma_stride", "weight_stride",
])  # fmt: skip
def gaussian_on_chip(
    pred: tl.tensor,
    target: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    losses: tl.tensor,
    sigma: tl.tensor,
    weight: tl.tensor,
    table: tl.tensor,
    profile: tl.tuple,
    count: tl.tensor,
    sigma_squared: tl.tensor,
    sigma_stride: tl.tensor,
    weight_stride: tl.tensor,
    scale: tl.tensor,
    grad_scale: tl.tensor,
    grad_divisor: tl.tensor,
    size: tl.tensor,
    pred_batch: tl.tensor,
    target_batch: tl.tensor,
    grad_batch: tl.tensor,
    mask_batch: tl.tensor,
    sizes: tl.tuple,
    pred_strides: tl.tuple,
    target_strides: tl.tuple,
    grad_strides: tl.tuple,
    mask_strides: tl.tuple,
    BLOCK: tl.constexpr,
    LINEAR: tl.constexpr,
    DIMS: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    MASK_VECTOR: tl.constexpr,
) -> None:
    """Losses and gradients, one program a sample, whose differences stay in registers: 3N bytes, one launch."""
    sample = tl.program_id(0)
    origin, lead = _origin(sample, pred_batch, ALIGN, VECTOR)
    target_origin, _ = _origin(sample, target_batch, ALIGN, VECTOR)
    grad_origin, _ = _origin(sample, grad_batch, ALIGN, VECTOR)
    lane = tl.arange(0, BLOCK)
    if ALIGN == 1:
        size = size // VECTOR * VECTOR
    valid = lane < size + lead
    if ALIGN == SHIFTED:
        valid = valid & (lane >= lead)
    start = lead - lead
    pointers = addresses(pred, origin, start, sizes, pred_strides, BLOCK, LINEAR, DIMS, False)
    difference = load(pointers, valid)
    pointers = addresses(target, target_origin, start, sizes, target_strides, BLOCK, LINEAR, DIMS, False)
    difference -= load(pointers, valid)
    mask_total = None
    if mask is not None:
        mask_origin, mask_lead = _mask_origin(sample, mask_batch, lead, DIMS, ALIGN, MASK_VECTOR)
        pointers = addresses(mask, mask_origin, start - mask_lead, sizes, mask_strides, BLOCK, DIMS == 0, DIMS, False)
        factor = load(pointers, valid)
        mask_total = tl.sum(factor)
        masked = factor * difference
        total = tl.sum(masked * difference)
    else:
        masked = difference
        total = tl.sum(masked * masked)
    loss, coefficient = _finish(
        total, mask_total, sample, sigma, weight, table, profile, count, sigma_squared, sigma_stride, weight_stride
    )
    tl.store(losses + sample, loss)
    coefficient = _scaled(coefficient, scale, grad_scale, grad_divisor)
    pointers = addresses(grad, grad_origin, start, sizes, grad_strides, BLOCK, LINEAR, DIMS, False)
    store(pointers, coefficient * masked, valid)


@triton.jit
def _accumulate(
    squares: tl.tensor,
    mask_sums: tl.tensor,
    pred: tl.tensor,
    target: tl.tensor,
    mask: tl.tensor,
    origin: tl.tensor,
    target_origin: tl.tensor,
    mask_origin: tl.tensor,
    start: tl.tensor,
    mask_lead: tl.tensor,
    valid: tl.tensor,
    sizes: tl.tuple,
    pred_strides: tl.tuple,
    target_strides: tl.tuple,
    mask_strides: tl.tuple,
    BLOCK: tl.constexpr,
    LINEAR: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The sums of a block's squares and mask, added to those before."""
    difference = load(addresses(pred, origin, start, sizes, pred_strides, BLOCK, LINEAR, DIMS, WIDE), valid)
    difference -= load(addresses(target, target_origin, start, sizes, target_strides, BLOCK, LINEAR, DIMS, WIDE), valid)
    if mask is not None:
        pointers = addresses(mask, mask_origin, start - mask_lead, sizes, mask_strides, BLOCK, DIMS == 0, DIMS, WIDE)
        factor = load(pointers, valid)
        mask_sums += factor
        squares += factor * difference * difference
    else:
        squares += difference * difference
    return squares, mask_sums


@triton.jit(do_not_specialize=[
    "pred_batch", "target_batch", "mask_batch", "size", "sigma_stride", "weight_stride", "parts", "blocks",
])  # fmt: skip
def gaussian_distance(
    pred: tl.tensor,
    target: tl.tensor,
    mask: tl.tensor,
    partials: tl.tensor,
    mask_partials: tl.tensor,
    losses: tl.tensor,
    coefficients: tl.tensor,
    sigma: tl.tensor,
    weight: tl.tensor,
    table: tl.tensor,
    profile: tl.tuple,
    count: tl.tensor,
    sigma_squared: tl.tensor,
    sigma_stride: tl.tensor,
    weight_stride: tl.tensor,
    size: tl.tensor,
    pred_batch: tl.tensor,
    target_batch: tl.tensor,
    mask_batch: tl.tensor,
    sizes: tl.tuple,
    pred_strides: tl.tuple,
    target_strides: tl.tuple,
    mask_strides: tl.tuple,
    parts: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
    LINEAR: tl.constexpr,
    DIMS: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    MASK_VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """Sums of squares of parts of samples; where a part is a sample, its loss and coefficient at once."""
    program = tl.program_id(0)
    sample, part = program // parts, program % parts
    origin, lead = _origin(sample, pred_batch, ALIGN, VECTOR)
    target_origin, _ = _origin(sample, target_batch, ALIGN, VECTOR)
    mask_origin, mask_lead = _mask_origin(sample, mask_batch, lead, DIMS, ALIGN, MASK_VECTOR)
    if ALIGN == 1:
        size = size // VECTOR * VECTOR
    end = lead + size
    lane = tl.arange(0, BLOCK)
    squares, mask_sums = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    first = part.to(tl.int64) * blocks
    last = tl.minimum(first + blocks, (end + BLOCK - 1) // BLOCK)
    for block in range(first, last):
        start = block * BLOCK
        if (start >= lead) & (start + BLOCK <= end):
            squares, mask_sums = _accumulate(
                squares, mask_sums, pred, target, mask, origin, target_origin, mask_origin, start, mask_lead, None,
                sizes, pred_strides, target_strides, mask_strides, BLOCK, LINEAR, DIMS, WIDE,
            )  # fmt: skip
        else:
            valid = (start + lane >= lead) & (start + lane < end)
            squares, mask_sums = _accumulate(
                squares, mask_sums, pred, target, mask, origin, target_origin, mask_origin, start, mask_lead, valid,
                sizes, pred_strides, target_strides, mask_strides, BLOCK, LINEAR, DIMS, WIDE,
            )  # fmt: skip
    total = tl.sum(squares)
    if partials is not None:
        tl.store(partials + program, total)
        if mask is not None:
            tl.store(mask_partials + program, tl.sum(mask_sums))
    else:
        mask_total = None
        if mask is not None:
            mask_total = tl.sum(mask_sums)
        loss, coefficient = _finish(
            total, mask_total, sample, sigma, weight, table, profile, count, sigma_squared, sigma_stride, weight_stride
        )
        tl.store(losses + sample, loss)
        tl.store(coefficients + sample, coefficient)


@triton.jit(do_not_specialize=["sigma_stride", "weight_stride", "parts"])
def gaussian_finish(
    partials: tl.tensor,
    mask_partials: tl.tensor,
    losses: tl.tensor,
    coefficients: tl.tensor,
    sigma: tl.tensor,
    weight: tl.tensor,
    table: tl.tensor,
    profile: tl.tuple,
    count: tl.tensor,
    sigma_squared: tl.tensor,
    sigma_stride: tl.tensor,
    weight_stride: tl.tensor,
    parts: tl.tensor,
    PARTIALS: tl.constexpr,
) -> None:
    """Losses and coefficients from partial sums, one program a sample."""
    sample = tl.program_id(0)
    total = _partials_total(partials, sample, parts, PARTIALS)
    mask_total = None
    if mask_partials is not None:
        mask_total = _partials_total(mask_partials, sample, parts, PARTIALS)
    loss, coefficient = _finish(
        total, mask_total, sample, sigma, weight, table, profile, count, sigma_squared, sigma_stride, weight_stride
    )
    tl.store(losses + sample, loss)
    tl.store(coefficients + sample, coefficient)


@triton.jit
def _write_gradient(
    coefficient: tl.tensor,
    pred: tl.tensor,
    target: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    origin: tl.tensor,
    target_origin: tl.tensor,
    grad_origin: tl.tensor,
    mask_origin: tl.tensor,
    start: tl.tensor,
    mask_lead: tl.tensor,
    valid: tl.tensor,
    sizes: tl.tuple,
    pred_strides: tl.tuple,
    target_strides: tl.tuple,
    grad_strides: tl.tuple,
    mask_strides: tl.tuple,
    BLOCK: tl.constexpr,
    LINEAR: tl.constexpr,
    DIMS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    difference = load(addresses(pred, origin, start, sizes, pred_strides, BLOCK, LINEAR, DIMS, WIDE), valid)
    difference -= load(addresses(target, target_origin, start, sizes, target_strides, BLOCK, LINEAR, DIMS, WIDE), valid)
    if mask is not None:
        pointers = addresses(mask, mask_origin, start - mask_lead, sizes, mask_strides, BLOCK, DIMS == 0, DIMS, WIDE)
        difference *= load(pointers, valid)
    pointers = addresses(grad, grad_origin, start, sizes, grad_strides, BLOCK, LINEAR, DIMS, WIDE)
    store(pointers, coefficient * difference, valid)


@triton.jit(do_not_specialize=[
    "pred_batch", "target_batch", "grad_batch", "mask_batch", "size", "sigma_stride", "weight_stride",
    "coefficient_stride", "parts", "blocks",
])  # fmt: skip
def gaussian_gradient(
    pred: tl.tensor,
    target: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    coefficients: tl.tensor,
    coefficient_stride: tl.tensor,
    partials: tl.tensor,
    mask_partials: tl.tensor,
    losses: tl.tensor,
    sigma: tl.tensor,
    weight: tl.tensor,
    table: tl.tensor,
    profile: tl.tuple,
    count: tl.tensor,
    sigma_squared: tl.tensor,
    sigma_stride: tl.tensor,
    weight_stride: tl.tensor,
    scale: tl.tensor,
    grad_scale: tl.tensor,
    grad_divisor: tl.tensor,
    size: tl.tensor,
    pred_batch: tl.tensor,
    target_batch: tl.tensor,
    grad_batch: tl.tensor,
    mask_batch: tl.tensor,
    sizes: tl.tuple,
    pred_strides: tl.tuple,
    target_strides: tl.tuple,
    grad_strides: tl.tuple,
    mask_strides: tl.tuple,
    parts: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
    LINEAR: tl.constexpr,
    DIMS: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    MASK_VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    PARTIALS: tl.constexpr,
) -> None:
    """Gradients from given coefficients, or from partial sums; then the first part of a sample writes its loss.

    The last programs and blocks come first: what gaussian_distance has read last is the most likely to be in L2.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, part = program // parts, program % parts
    if partials is not None:
        total = _partials_total(partials, sample, parts, PARTIALS)
        mask_total = None
        if mask_partials is not None:
            mask_total = _partials_total(mask_partials, sample, parts, PARTIALS)
        loss, coefficient = _finish(
            total, mask_total, sample, sigma, weight, table, profile, count, sigma_squared, sigma_stride, weight_stride
        )
        tl.store(losses + sample, loss, mask=part == 0)
        coefficient = _scaled(coefficient, scale, grad_scale, grad_divisor)
    else:
        coefficient = tl.load(coefficients + sample.to(tl.int64) * coefficient_stride)
    origin, lead = _origin(sample, pred_batch, ALIGN, VECTOR)
    target_origin, _ = _origin(sample, target_batch, ALIGN, VECTOR)
    grad_origin, _ = _origin(sample, grad_batch, ALIGN, VECTOR)
    mask_origin, mask_lead = _mask_origin(sample, mask_batch, lead, DIMS, ALIGN, MASK_VECTOR)
    if ALIGN == 1:
        size = size // VECTOR * VECTOR
    end = lead + size
    lane = tl.arange(0, BLOCK)
    first = part.to(tl.int64) * blocks
    last = tl.minimum(first + blocks, (end + BLOCK - 1) // BLOCK)
    for step in range(first, last):
        start = (first + last - 1 - step) * BLOCK
        if (start >= lead) & (start + BLOCK <= end):
            _write_gradient(
                coefficient, pred, target, grad, mask, origin, target_origin, grad_origin, mask_origin, start,
                mask_lead, None, sizes, pred_strides, target_strides, grad_strides, mask_strides, BLOCK, LINEAR, DIMS,
                WIDE,
            )  # fmt: skip
        else:
            valid = (start + lane >= lead) & (start + lane < end)
            _write_gradient(
                coefficient, pred, target, grad, mask, origin, target_origin, grad_origin, mask_origin, start,
                mask_lead, valid, sizes, pred_strides, target_strides, grad_strides, mask_strides, BLOCK, LINEAR, DIMS,
                WIDE,
            )  # fmt: skip
