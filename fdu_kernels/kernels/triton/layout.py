"""How a kernel walks over tensors of one shape: dimensions collapsed, contiguous runs found, nothing copied."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

from torch import Tensor

MAX_DIMS = 5
"""Collapsed dimensions that a kernel takes; tensors that need more are copied first."""
UNALIGNED, ALIGNED, SHIFTED = 0, 1, 2
"""Of 16-byte boundaries: nothing known; each sample begins and ends at one; or all tensors begin equally far."""
INDEX_LIMIT = 2**31 - 2**20
"""Positions from here on are decomposed in 64 bits. The margin is more than a block reaches beyond the end."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The positions 0 ... size - 1 of a sample, and where each tensor has them.

    linear: whether position i of every data tensor is at offset i.
    dims: how many numbers a position is decomposed into for the tensors that are not linear; 0 if all are.
    sizes: the inner dims - 1 sizes, the innermost first.
    strides: for every tensor, data tensors first, its dims strides, the innermost first.
    """

    size: int
    linear: bool
    dims: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def wide(self) -> bool:
        """Whether positions need 64 bits. Offsets always have them."""
        return self.size >= INDEX_LIMIT


def broadcast_strides(tensor: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of ``tensor.expand(shape)``."""
    own = (0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (0,) * (len(shape) - tensor.ndim) + tuple(own)


@functools.lru_cache(maxsize=4096)
def collapse(
    shape: tuple[int, ...], data: tuple[tuple[int, ...], ...], others: tuple[tuple[int, ...], ...] = ()
) -> Layout | None:
    """The layout of tensors of one shape, a sample's or the whole tensor's; None where more than MAX_DIMS are left.

    data: strides of the tensors as large as the shape, of which the last decides the order of the walk; others: of
    those that are smaller and broadcast.
    """
    size = math.prod(shape)
    flat = Layout(size, True, 0, (), ((),) * (len(data) + len(others)))
    if size <= 1:
        return flat
    columns = [*zip(*data, strict=True)], [*zip(*others, strict=True)] or [()] * len(shape)
    dims = [dim for dim in zip(shape, *columns, strict=True) if dim[0] != 1]
    dims.sort(key=lambda dim: dim[1][::-1], reverse=True)
    is_linear = _contiguous(_merged([(length, strides) for length, strides, _ in dims]))
    if is_linear:
        # Only the others' positions are decomposed, if any.
        merged = _merged([(length, strides) for length, _, strides in dims])
        if not others or _contiguous(merged):
            return flat
    else:
        merged = _merged([(length, data_strides + strides) for length, data_strides, strides in dims])
    if len(merged) > MAX_DIMS:
        return None
    merged.reverse()
    sizes, strides = zip(*merged, strict=True)
    by_tensor = ((),) * len(data) * is_linear + tuple(zip(*strides, strict=True))
    return Layout(size, is_linear, len(merged), sizes[:-1], by_tensor)


def _contiguous(merged: list[tuple[int, tuple[int, ...]]]) -> bool:
    return len(merged) == 1 and all(stride == 1 for stride in merged[0][1])


def alignment(layout: Layout, batch: int, batch_strides: Sequence[int], addresses: Sequence[int], vector: int) -> int:
    """UNALIGNED, ALIGNED or SHIFTED: of data tensors with these addresses; vector: elements in 16 bytes."""
    if not layout.linear or any(address % 16 for address in addresses):
        return UNALIGNED
    if batch == 1:
        return ALIGNED if layout.size % vector == 0 else SHIFTED
    if layout.size % vector == 0 and all(stride % vector == 0 for stride in batch_strides):
        return ALIGNED
    return SHIFTED if len({stride % vector for stride in batch_strides}) == 1 else UNALIGNED


def _merged(dims: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Dimensions, the outermost first, of which neighbours are joined where all strides allow it."""
    result = [dims[0]]
    for length, strides in dims[1:]:
        outer_length, outer = result[-1]
        if all(a == length * b for a, b in zip(outer, strides, strict=True)):
            result[-1] = (outer_length * length, strides)
        else:
            result.append((length, strides))
    return result
