"""Device functions: exponentials and logarithms to full accuracy, Gaussian profiles, addresses."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

HEADER_ROWS, NEIGHBOURS = tl.constexpr(4), tl.constexpr(8)
"""As in fdu_kernels.profiles."""
SHIFTED = tl.constexpr(2)
"""As in .layout."""


@triton.jit
def bounded_exp(x: tl.tensor) -> tl.tensor:
    """e^x of float32 for |x| <= 88, to 4e-7; 0 where it is no normal number."""
    product = x * 1.4426950408889634
    power = tl.exp2(product)
    # What rounding the product did to the power; the interpreter's fma rounds twice.
    if INTERPRETED:
        power = tl.where(product < -126.0, 0.0, power)  # as devices round it
        lost = (x.to(tl.float64) - product.to(tl.float64) * 0.6931471805599453).to(tl.float32)
    else:
        lost = tl.fma(product, -0.6931471805599453, x)
    return power + power * lost


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """The same of any x; the largest number's e^88 and 0 beyond."""
    return bounded_exp(tl.where(x < -88.0, -88.0, tl.where(x > 88.0, 88.0, x)))


@triton.jit
def expm1_ratio(x: tl.tensor) -> tl.tensor:
    """expm1(x) / x for |x| <= 1/2, by its series: 1 at 0."""
    result = 1.0 + x * (1.0 / 10)
    for n in tl.static_range(9, 1, -1):
        result = 1.0 + x * (1.0 / n) * result
    return result


@triton.jit
def expm1(x: tl.tensor, exponential: tl.tensor) -> tl.tensor:
    """e^x - 1 of float32 to full relative accuracy, given e^x."""
    series = 0.00836610276896 + x * 0.00139455568637
    series = 0.5 + x * (0.166665481618 + x * (0.0416662991916 + x * series))
    return tl.where(tl.abs(x) < 0.34657359, x + x * x * series, exponential - 1.0)


@triton.jit
def falling_exp(x: tl.tensor) -> tl.tensor:
    """e^-|x| of float32 for any x; 0 where it is no normal number."""
    falling = -tl.abs(x)
    return bounded_exp(tl.where(falling < -88.0, -88.0, falling))


@triton.jit
def reciprocal(x: tl.tensor) -> tl.tensor:
    """1 / x of float32 for x in [1, 2]: a division takes several instructions more."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def shifted_softplus(x: tl.tensor, falling: tl.tensor) -> tl.tensor:
    """log((1 + e^x)/2) of float32, given e^-|x|, to full relative accuracy: near 0 as x/2 and an even rest."""
    square = x * x
    even = 0.12499963408514915 + square * (
        -0.005205298462924262 + square * (0.0003401914284955045 - square * 2.0057977e-5)
    )
    # log(1 + z)/z for z < e^-1.25
    series = 0.329994123786815 + falling * (-0.2246242355013161 + falling * 0.10593520305354646)
    series = 0.9999961719709741 + falling * (-0.4998027785133836 + falling * series)
    far = falling * series + (tl.where(x > 0.0, x, 0.0) - 0.6931471805599453)
    return tl.where(tl.abs(x) < 1.25, x * (0.5 + x * even), far)


@triton.jit
def logarithm(u: tl.tensor, x: tl.tensor) -> tl.tensor:
    """log(u) of float32, given x = u - 1 as well, to full relative accuracy: near u = 1 by the series of
    2 artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    w = s * s
    series = 1.0 / 11 + w * (1.0 / 13 + w * (1.0 / 15 + w * (1.0 / 17)))
    series = 1.0 / 3 + w * (1.0 / 5 + w * (1.0 / 7 + w * (1.0 / 9 + w * series)))
    return tl.where(tl.abs(x) < 0.5, 2.0 * s * (1.0 + w * series), tl.log(u))


@triton.jit
def _read_table(table: tl.tensor, s: tl.tensor, COLUMN: tl.constexpr) -> tl.tensor:
    """h (COLUMN 0) or h' (COLUMN 1) of a float64 scalar s, as fdu_kernels.profiles reads it."""
    first, step = tl.load(table), tl.load(table + 1)
    bottom, top = tl.load(table + 2), tl.load(table + 3)
    power, smallest = tl.load(table + 4 + COLUMN), tl.load(table + 7)
    t = (tl.log(tl.where(s < smallest, smallest, s)) - first) / step
    position = tl.where(t < bottom, bottom, tl.where(t > top, top, t))
    # A NaN has no place in the table: it takes the first one and stays NaN through its offset.
    index = tl.floor(tl.where(position == position, position, bottom))
    index = tl.where(index > top - 1.0, top - 1.0, index)
    x = position - index
    lane = tl.arange(0, NEIGHBOURS)
    node = lane + (1 - NEIGHBOURS // 2)
    # One lane a node: a thread evaluates one weight instead of eight.
    weight = tl.where(lane % 2 == 0, -1.0, 1.0).to(tl.float64)
    for other in tl.static_range(NEIGHBOURS):
        at = other + (1 - NEIGHBOURS // 2)
        weight *= tl.where(node == at, 1.0, x - at)
    inner = tl.where((lane == 2) | (lane == 5), 240.0, 144.0)
    factorials = tl.where((lane == 0) | (lane == 7), 5040.0, tl.where((lane == 1) | (lane == 6), 720.0, inner))
    rows = index.to(tl.int32) + node + HEADER_ROWS
    logarithm = tl.sum(weight / factorials * tl.load(table + 2 * rows + COLUMN))
    below = tl.where(t < bottom, t - bottom, 0.0) * step * power
    result = tl.exp(logarithm + below)
    if COLUMN == 0:
        result *= tl.where(s < smallest, s, smallest) / smallest
    return result


@triton.jit
def profile_at(s: tl.tensor, table: tl.tensor, profile: tl.tuple) -> tl.tuple:
    """h(s) and h'(s), float32; profile is (c, k, c / k, linear_beyond)."""
    c, k, ratio, linear_beyond = profile
    if table is not None:
        wide = s.to(tl.float64)
        linear_beyond = tl.load(table + 6)
        inside = tl.where(wide > linear_beyond, linear_beyond, wide)
        value = _read_table(table, inside, 0)
        slope = _read_table(table, inside, 1)
        value += slope * tl.where(wide > linear_beyond, wide - linear_beyond, 0.0)
    else:
        inside = tl.where(s > linear_beyond, linear_beyond, s)
        x = k * inside
        value = tl.where(tl.abs(x) < 0.5, c * inside * expm1_ratio(x), (exp(x) - 1.0) * ratio)
        value = tl.where(k == 0.0, c * inside, value)
        slope = tl.where(k == 0.0, tl.where(s == s, c, s), c * exp(x))
        value += slope * tl.where(s > linear_beyond, s - linear_beyond, 0.0)
    return value.to(tl.float32), slope.to(tl.float32)


@triton.jit
def strided_offsets(index: tl.tensor, sizes: tl.tuple, strides: tl.tuple, DIMS: tl.constexpr) -> tl.tensor:
    """The offsets, in 64 bits, of positions in a walk over DIMS dimensions, the innermost first."""
    offsets = tl.zeros(index.shape, tl.int64)
    for dim in tl.static_range(DIMS - 1):
        outer = index // sizes[dim]
        offsets += (index - outer * sizes[dim]).to(tl.int64) * strides[dim]
        index = outer
    return offsets + index.to(tl.int64) * strides[DIMS - 1]


@triton.jit
def addresses(
    tensor: tl.tensor, base: tl.tensor, start: tl.tensor, sizes: tl.tuple, strides: tl.tuple,
    BLOCK: tl.constexpr, LINEAR: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Pointers to the positions start ... start + BLOCK - 1 of the sample at ``base``, both int64."""
    lane = tl.arange(0, BLOCK)
    if LINEAR:
        pointers = tensor + (base + start) + lane
    elif WIDE:
        pointers = tensor + base + strided_offsets(start + lane, sizes, strides, DIMS)
    else:
        pointers = tensor + base + strided_offsets(start.to(tl.int32) + lane, sizes, strides, DIMS)
    return pointers


@triton.jit
def load(pointers: tl.tensor, valid: tl.tensor) -> tl.tensor:
    """In float32; 0 where ``valid``, if there is one, is false."""
    if valid is None:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=valid, other=0)
    return values.to(tl.float32)


@triton.jit
def store(pointers: tl.tensor, values: tl.tensor, valid: tl.tensor) -> None:
    """Round once; write where ``valid``, if there is one, is true."""
    tl.store(pointers, values.to(pointers.dtype.element_ty), mask=valid)
