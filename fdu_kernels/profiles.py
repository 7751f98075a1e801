"""Gaussian profiles: the divergence of two Gaussians with the same covariance as a function h of their distance s.

With s the squared Mahalanobis distance, h(s) = E[f(e^v)] for every f, v normal with mean -s/2 and variance s. Where h
is elementary, (c, k) give h(s) = c expm1(k s)/k. All else is read from a table, which fdu_kernels.tabulation makes.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from fdu_kernels.internals import is_capturing, on_the_cpu
from fdu_kernels.scalar import MAX_EXPONENT, Scalar

HEADER_ROWS = 4
"""Rows of a table before its first entry."""
NEIGHBOURS = 8
"""Rows that a place is read from, by the polynomial through them."""
SMALLEST_S = 1e-30
"""h' is not evaluated closer to 0: where f has a kink at 1 it is infinite there, and 0 times inf would be NaN."""


class Grid(NamedTuple):
    """Where the rows of a table lie, and how it goes on beyond them.

    Row i is at t = log s = first + i step. Between the rows bottom and top all 8 neighbours of a place are there.
    powers: d log h/dt and d log h'/dt at ``bottom``. linear_beyond: the s beyond which h is a straight line; inf
    where h' has vanished instead.
    """

    first: float
    step: float
    bottom: int
    top: int
    powers: tuple[float, float]
    linear_beyond: float
    smallest: float = SMALLEST_S  # a field: compiled code would have a symbol for a global number


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianProfile:
    """h(s) = c expm1(k s)/k, and c s for k = 0, continued as a straight line beyond ``linear_beyond``; or a table.

    table: None, or float64 [HEADER_ROWS + n, 2] on the CPU, for kernels to read: the rows (first, step),
    (bottom, top), powers and (linear_beyond, smallest) of the grid; then log h and log h' by row. Power laws at
    s -> 0 are straight lines in these variables.
    """

    c: float
    k: float
    linear_beyond: float
    table: Tensor | None = None
    grid: Grid | None = None

    @staticmethod
    def exponential(c: float, k: float) -> GaussianProfile:
        """An elementary profile."""
        return GaussianProfile(c, k, MAX_EXPONENT / k if k > 0 else math.inf)

    @staticmethod
    def tabulated(grid: Grid, logs: Tensor) -> GaussianProfile:
        """A profile from log h and log h' [n, 2]."""
        header = [grid[:2], grid[2:4], grid.powers, (grid.linear_beyond, grid.smallest)]
        table = torch.cat([torch.tensor(header, dtype=torch.float64), logs])
        return GaussianProfile(0.0, 0.0, grid.linear_beyond, table.contiguous(), grid)

    def table_on(self, device: torch.device) -> Tensor | None:
        """The table on a device, moved there once. Raises RuntimeError if a capture would have to move it."""
        if self.table is None or self.table.device == device:
            return self.table
        moved = _MOVED.setdefault(self, {})
        if is_capturing(device):
            if device not in moved:
                remedy = "before the capture, call fdu_kernels.warm_up, or the loss itself once"
                raise RuntimeError(f"a capture cannot move the table of this divergence to {device}; {remedy}")
            _CAPTURED.add(self)
        if device not in moved:
            with on_the_cpu():  # the dtype first: the device may not have that of the table
                moved[device] = self.table.to(widest_dtype(device)).to(device)
        return moved[device]

    def scalar(self) -> Scalar:
        """h in PyTorch operations: twice differentiable at s >= 0 of any shape, in float32 or float64."""
        c, k = self.c, self.k
        if self.grid is not None:
            return Scalar(lambda s: self._read(s, 0), lambda s: self._read(s, 1), high=self.linear_beyond)
        if k == 0:
            return Scalar(lambda s: c * s, lambda s: c + 0 * s.clamp(0, 1))
        return Scalar(lambda s: torch.expm1(k * s) * (c / k), lambda s: c * torch.exp(k * s), high=self.linear_beyond)

    def _read(self, s: Tensor, column: int) -> Tensor:
        """h (column 0) or h' (column 1), interpolated in float64 where there is one, and returned in the dtype of s."""
        table, grid = self.table_on(s.device), self.grid
        assert table is not None and grid is not None
        wide = s.to(table.dtype)
        result = torch.exp(self.log_at(torch.log(wide.clamp(min=grid.smallest)), column))
        if column == 0:
            # Not s / wide.clamp(min=grid.smallest), which is inf / inf for the largest s.
            result = result * (wide.clamp(max=grid.smallest) / grid.smallest)
        return result.to(s.dtype)

    def log_at(self, t: Tensor, column: int) -> Tensor:
        """log h (column 0) or log h' (column 1) at t = log s, as the table goes on below; up to its top."""
        table, grid = self.table_on(t.device), self.grid
        assert table is not None and grid is not None
        place = (t - grid.first) / grid.step
        position = place.clamp(grid.bottom, grid.top)
        # A NaN has no place in the table: it takes the first one and stays NaN through its offset.
        index = torch.nan_to_num(position.detach(), nan=grid.bottom).floor().long().clamp(max=grid.top - 1)
        neighbours = torch.arange(1 - NEIGHBOURS // 2, NEIGHBOURS // 2 + 1, device=t.device) + HEADER_ROWS
        read = (lagrange_weights(position - index) * table[index[..., None] + neighbours, column]).sum(-1)
        return read + grid.powers[column] * grid.step * (place - grid.bottom).clamp(max=0)


def lagrange_weights(x: Tensor) -> Tensor:
    """Weights [..., 8] of the polynomial through the nodes -3 ... 4, at x in [0, 1]."""
    nodes = range(1 - NEIGHBOURS // 2, NEIGHBOURS // 2 + 1)
    weights = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        product = (x - others[0]) / (node - others[0])
        for other in others[1:]:
            product = product * (x - other) / (node - other)
        weights.append(product)
    return torch.stack(weights, -1)


_MOVED: weakref.WeakKeyDictionary[GaussianProfile, dict[torch.device, Tensor]] = weakref.WeakKeyDictionary()
"""Tables on devices. They live as long as their profile."""
_CAPTURED: set[GaussianProfile] = set()
"""Profiles that captured graphs read. They are kept: a graph may be replayed when nothing else knows the divergence."""


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices without it: to a relative error of about 1e-5."""
    if device.type == "mps" or (device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return torch.float32
    return torch.float64
