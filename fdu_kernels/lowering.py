"""A divergence as numbers: what a fused kernel gets instead of functions.

A Gaussian profile is (c, k) or a table; a function of the density-ratio estimate is two rows over one basis. A kernel
that evaluates these two forms computes every divergence of the catalogue, and compiles nothing anew for another one.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from fdu_kernels.critic import CriticRow, critic_terms, ratio_terms
from fdu_kernels.divergence import Divergence
from fdu_kernels.profiles import SMALLEST_S, profile_table
from fdu_kernels.scalar import MAX_EXPONENT

HEADER_ROWS = 4
"""Rows of a packed table before its first entry."""
ROW_FIELDS = tuple(field.name for field in dataclasses.fields(CriticRow))
"""The order in which a row's numbers are packed."""
LARGEST_EXPONENT = 87.0
"""Below the least and the largest normal number of float32."""
DERIVATIVE, FIRST, SECOND = 0.0, 1.0, 2.0
"""What the slope of an :class:`ElementFunction` is."""


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianProfile:
    """h(s) = c expm1(k s)/k, and c s for k = 0, continued as a straight line beyond ``linear_beyond``; or a table.

    table: None, or float64 [HEADER_ROWS + n, 2] on the CPU, read as in fdu_kernels.profiles: the rows (first, step),
    (bottom, top), (power of h, power of h'), (linear_beyond, smallest s), then log h and log h' at t = first + i step.
    """

    c: float
    k: float
    linear_beyond: float
    table: Tensor | None = None

    def table_on(self, device: torch.device) -> Tensor | None:
        """The table on a device, moved there once."""
        return self.table if self.table is None or self.table.device == device else _moved(self, device)


@functools.lru_cache(maxsize=256)
def _moved(profile: GaussianProfile, device: torch.device) -> Tensor:
    assert profile.table is not None
    return profile.table.to(device)


@functools.lru_cache(maxsize=1024)
def gaussian_profile(divergence: Divergence) -> GaussianProfile:
    """The profile h of a divergence, for kernels.

    Raises:
        ValueError: the divergence has neither (c, k) nor a generator to tabulate.
    """
    if divergence.exponential is not None:
        c, k = divergence.exponential
        return GaussianProfile(c, k, MAX_EXPONENT / k if k > 0 else math.inf)
    table = profile_table(divergence)
    header = [
        [table.first, table.step],
        [table.bottom, table.top],
        list(table.powers),
        [table.linear_beyond, SMALLEST_S],
    ]
    packed = torch.cat([torch.tensor(header, dtype=torch.float64, device="cpu"), table.log_values])
    return GaussianProfile(0.0, 0.0, table.linear_beyond, packed.contiguous())


@dataclasses.dataclass(frozen=True)
class ElementFunction:
    """y(v) = e^(first_tilt v) first(v) - e^(second_tilt v) second(v), and its slope, for one element v.

    slope: DERIVATIVE (first'(v); there is no second row and no tilt then), FIRST (the tilted first row itself) or
    SECOND (the tilted second row). Beyond |v| = limit, y is a straight line with the slope of the end.
    """

    first: CriticRow
    first_tilt: float
    second: CriticRow
    second_tilt: float
    slope: float
    limit: float

    numbers: tuple[float, ...] = dataclasses.field(init=False, repr=False, compare=False)
    """[limit, slope, first_tilt, *first, second_tilt, *second], rows in the order of ROW_FIELDS: 34 numbers."""

    def __post_init__(self) -> None:
        first, second = (tuple(getattr(row, name) for name in ROW_FIELDS) for row in (self.first, self.second))
        numbers = (self.limit, self.slope, self.first_tilt, *first, self.second_tilt, *second)
        object.__setattr__(self, "numbers", numbers)
        for row, tilt in ((self.first, self.first_tilt), (self.second, self.second_tilt)):
            exponents = (tilt, row.exp_rate + tilt if row.exp else 0.0, row.expm1_rate if row.expm1 else 0.0)
            largest = max(map(abs, exponents))
            assert largest * (self.limit if largest else 0.0) <= LARGEST_EXPONENT, "kernels trust the limit"

    def negated(self) -> ElementFunction:
        """-y(v), of a function that is one row."""
        assert self.slope == DERIVATIVE
        logistic = ("softplus", "sigmoid", "tanh", "tanh_squared")
        coefficients = ("const", "linear", "square", "exp", "expm1", *logistic, "step")
        negative = {name: -getattr(self.first, name) for name in coefficients}
        return dataclasses.replace(self, first=dataclasses.replace(self.first, **negative))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(numbers: tuple[float, ...]) -> ElementFunction:
        """The function whose ``numbers`` these are."""
        limit, slope, first_tilt, *rest = numbers
        count = len(ROW_FIELDS)
        first, second_tilt, second = CriticRow(*rest[:count]), rest[count], CriticRow(*rest[count + 1 :])
        return ElementFunction(first, first_tilt, second, second_tilt, slope, limit)


@functools.lru_cache(maxsize=1024)
def critic_functions(divergence: Divergence, parametrization: str) -> tuple[ElementFunction, ElementFunction] | None:
    """A and B of the variational bound; None for a user's generator, which is no row.

    Raises:
        ValueError: as :func:`fdu_kernels.critic.critic_terms`.
    """
    terms = critic_terms(divergence, parametrization)
    rows = divergence.critic_rows(parametrization)
    if rows is None:
        return None
    a, b = (
        ElementFunction(row, 0.0, CriticRow(), 0.0, DERIVATIVE, term.high)
        for row, term in zip(rows, terms, strict=True)
    )
    return a, b


@functools.lru_cache(maxsize=1024)
def ratio_function(divergence: Divergence, samples_from: str) -> ElementFunction | None:
    """f(r) (samples from "q") or f(r)/r (from "p") of the log density ratio; None for a user's generator.

    Raises:
        ValueError: as :func:`fdu_kernels.critic.ratio_terms`.
    """
    term = ratio_terms(divergence, samples_from)
    rows = divergence.critic_rows("log_ratio")
    if rows is None:
        return None
    a, b = rows
    if samples_from == "q":
        return ElementFunction(a, 1.0, b, 0.0, FIRST, term.high)
    return ElementFunction(a, 0.0, b, -1.0, SECOND, term.high)
