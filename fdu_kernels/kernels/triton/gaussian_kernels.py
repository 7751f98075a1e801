"""The Gaussian kernels: squared distances, profiles and gradients, one or several programs a sample.

A sample is walked over from an origin, which SHIFTED alignment moves down to a 16-byte boundary: its elements are the
positions lead ... lead + size - 1 from there. Positions outside are guarded, and all blocks inside are not.

``tensors``: pred, target, grad, mask (the last two may be None). ``numbers``: sigma, its stride, weight, table,
profile, count, sigma^2. ``scale``, of gradients: tensor, number, divisor. ``walk``: tensors, origins, sizes, strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fdu_kernels.kernels.triton.scalars import SHIFTED, addresses, load, profile_at, store

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
    """The loss of a sample, and what its masked differences are to be multiplied by."""
    sigma, sigma_stride, weight, table, profile, count, sigma_squared = numbers
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
