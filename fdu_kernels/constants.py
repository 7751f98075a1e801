"""The constants of a divergence in a call: its profile, or its functions of the density ratio.

Compiled code holds a table and a row of numbers as constants. It can find them by a string, not by a divergence. The
numbers (c, k) of an elementary profile are no constants: a sweep of alpha is one graph.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fdu_kernels import custom
from fdu_kernels.catalogue import find_divergence
from fdu_kernels.critic import ElementFunction
from fdu_kernels.divergence import Divergence, Function
from fdu_kernels.internals import held_constant
from fdu_kernels.profiles import GaussianProfile

_THIS = sys.modules[__name__]


def profile_of(divergence: Divergence, pred: Tensor) -> GaussianProfile:
    """h, for a call of that tensor."""
    if not torch.compiler.is_compiling():
        profile = divergence.gaussian_profile
        if profile.table is None or not isinstance(pred, FakeTensor):
            return profile
        return dataclasses.replace(profile, table=pred.fake_mode.from_tensor(profile.table))
    if divergence.exponential is not None:
        c, k = divergence.exponential
        return GaussianProfile.exponential(c, k)
    grid, table = _grid(divergence.key), getattr(_THIS, _table_name(divergence.key, pred.device))()
    return GaussianProfile(0.0, 0.0, grid.linear_beyond, table, grid)


def bound_terms(divergence: Divergence, parametrization: str) -> tuple[Function, Function]:
    """A and -B of the variational bound."""
    if not torch.compiler.is_compiling():
        return divergence.bound_terms(parametrization)
    if divergence.custom is not None:
        own = custom.critic_functions(divergence.custom)
        return own[0], own[1].negated()
    a, minus_b = (ElementFunction.of(_numbers_of(divergence.key, parametrization, part)) for part in (0, 1))
    return a, minus_b


def ratio_function(divergence: Divergence, samples_from: str) -> Function:
    """The integrand of the density-ratio estimate."""
    if not torch.compiler.is_compiling():
        return divergence.ratio_function(samples_from)
    if divergence.custom is not None:
        return custom.ratio_function(divergence.custom, samples_from)
    return ElementFunction.of(_numbers_of(divergence.key, samples_from))


@held_constant
def _grid(key: str) -> Any:
    return find_divergence(key).gaussian_profile.grid


@held_constant
def _table_name(key: str, device: torch.device) -> str:
    """The name of a function of this module that gives a table.

    Dynamo tells constants apart by the names of the functions that give them, so that each table needs one.
    """

    plain: Any = find_divergence(key).gaussian_profile.table_on(device)
    # A parameter's sizes are no symbols: its 2 columns are not taken for a dimension that is 2. Exports allow none.
    constant = torch.nn.Parameter(plain, requires_grad=False)

    def table() -> Tensor:
        return plain if torch.compiler.is_exporting() else constant

    name = f"table_{hashlib.blake2b(f'{key} {device}'.encode()).hexdigest()[:16]}"  # the same in every process
    table.__code__ = table.__code__.replace(co_name=name)
    vars(_THIS).setdefault(name, held_constant(table))
    return name


@held_constant
def _numbers_of(key: str, form: str, part: int | None = None) -> tuple[float, ...]:
    """The numbers of the ratio function for samples from ``form``; with a part, 0 or 1, those of A or -B."""
    one = find_divergence(key)
    function = one.ratio_function(form) if part is None else one.bound_terms(form)[part]
    return function.numbers or ()
