"""The numbers that kernels get: evaluated as documented, they are the functions of the reference."""

from __future__ import annotations

import math

import pytest
import torch

import fdu_kernels as fk
from fdu_kernels.critic import critic_terms, ratio_terms
from fdu_kernels.lowering import (
    DERIVATIVE,
    FIRST,
    HEADER_ROWS,
    ElementFunction,
    critic_functions,
    gaussian_profile,
    ratio_function,
)
from fdu_kernels.profiles import profile_table
from fdu_kernels.scalar import Scalar

CRITICS = [name for name in (*fk.divergences(), "alpha:-1", "hockey_stick:0.5") if name != "mse"]
CUSTOM = fk.Divergence.from_generator(lambda u: (u - 1).square(), "own")


def same(function: ElementFunction, expected: Scalar) -> None:
    again = ElementFunction.of(function.numbers)
    assert again == function and again.numbers == function.numbers and len(function.numbers) == 34
    v = torch.linspace(-6, 6, 41, dtype=torch.float64)
    first, second = again.first.value(v, again.first_tilt), again.second.value(v, again.second_tilt)
    assert expected.high == -expected.low == again.limit
    assert torch.equal(first - second, expected.value_at(v))
    slope = again.first.slope(v) if again.slope == DERIVATIVE else first if again.slope == FIRST else second
    assert torch.equal(slope, expected.slope_at(v))


@pytest.mark.parametrize("name", CRITICS)
def test_critics_and_ratios(name: str) -> None:
    divergence = fk.get_divergence(name)
    for parametrization in ("log_ratio", "fgan"):
        functions = critic_functions(divergence, parametrization)
        assert functions is not None
        for function, expected in zip(functions, critic_terms(divergence, parametrization), strict=True):
            same(function, expected)
    for samples_from in ("q", "p"):
        function = ratio_function(divergence, samples_from)
        assert function is not None
        same(function, ratio_terms(divergence, samples_from))


@pytest.mark.parametrize("name", fk.divergences())
def test_profiles(name: str) -> None:
    divergence = fk.get_divergence(name)
    profile = gaussian_profile(divergence)
    if divergence.exponential is not None:
        assert (profile.c, profile.k) == divergence.exponential and profile.table is None
        assert profile.linear_beyond == (64 / profile.k if profile.k > 0 else math.inf)
        assert profile.table_on(torch.device("cpu")) is None
        return
    table, packed = profile_table(divergence), profile.table
    assert packed is not None and packed.dtype == torch.float64 and packed.is_contiguous()
    assert packed[:HEADER_ROWS].flatten().tolist() == [
        table.first, table.step, table.bottom, table.top, *table.powers, table.linear_beyond, 1e-30,
    ]  # fmt: skip
    assert torch.equal(packed[HEADER_ROWS:], table.log_values)
    assert profile.table_on(torch.device("cpu")) is packed
    on_meta = profile.table_on(torch.device("meta"))
    assert on_meta is profile.table_on(torch.device("meta")) and on_meta is not None and on_meta.is_meta


def test_a_users_generator_has_a_profile_and_no_rows() -> None:
    assert gaussian_profile(CUSTOM).table is not None
    assert critic_functions(CUSTOM, "log_ratio") is None and ratio_function(CUSTOM, "q") is None


def test_what_has_no_critic_says_so() -> None:
    with pytest.raises(ValueError, match="'mse' is a Gaussian profile without a generator"):
        critic_functions(fk.get_divergence("mse"), "log_ratio")
    with pytest.raises(ValueError, match="'mse' is a Gaussian profile without a generator"):
        ratio_function(fk.get_divergence("mse"), "q")


def test_a_key_finds_its_divergence_again() -> None:
    from fdu_kernels.catalogue import find_divergence

    other = fk.Divergence.from_generator(lambda u: (u - 1).square(), "own")
    for divergence in (CUSTOM, other, fk.get_divergence("alpha:0.3"), fk.get_divergence("kl")):
        assert find_divergence(divergence.key) is divergence
    assert CUSTOM.key != other.key
