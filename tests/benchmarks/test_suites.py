"""The suites at tiny size: what they measure is what they say, and a wrong candidate is caught before it is timed."""

from __future__ import annotations

import importlib
import math
from typing import Any

import bench_memory
import bench_scaling
import candidates
import host_levels
import memory_peak
import pytest
import torch
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels.calls import GaussianCall
from fdu_kernels.kernels.native import cpu

SHAPE = (3, 4, 8, 8)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("form", candidates.FORMS)
@pytest.mark.parametrize("dtype", candidates.DTYPES)
def test_ours_pass_the_check_that_precedes_every_timing(form: str, dtype: str) -> None:
    a, b = candidates.inputs(SHAPE, candidates.DTYPES[dtype], "cpu")
    for which in ("eager", "autograd", "value_and_grad"):
        candidates.check(candidates.candidate(form, which, "cpu"), form, a, b)


def test_a_wrong_candidate_does_not_pass() -> None:
    a, b = candidates.inputs(SHAPE, torch.float32, "cpu")
    right = candidates.candidate("gaussian", "value_and_grad", "cpu")

    def wrong_value(a: Tensor, b: Tensor) -> candidates.Outcome:
        value, grad = right(a, b)
        return value * 1.01, grad

    def wrong_element(a: Tensor, b: Tensor) -> candidates.Outcome:
        value, grad = right(a, b)
        grad.view(-1)[7] += 1e-3
        return value, grad

    for wrong in (wrong_value, wrong_element):
        with pytest.raises(AssertionError):
            candidates.check(wrong, "gaussian", a, b)


def test_inputs_differ_by_seed_and_not_by_call() -> None:
    (a, b), (c, _), (d, _) = (candidates.inputs(SHAPE, torch.float32, "cpu", seed) for seed in (0, 1, 0))
    assert torch.equal(a, d) and not torch.equal(a, c) and not torch.equal(a, b)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    x = torch.randn(1000)

    def two_after_each_other() -> Tensor:
        (x + 1).sum()
        return (x + 2).sum()

    def two_at_once() -> Tensor:
        first = x + 1
        return (first + x).sum() + first.sum()

    small = 64  # the sums themselves
    assert 4000 <= memory_peak.peak_bytes(two_after_each_other, "cpu") <= 4000 + small
    assert 8000 <= memory_peak.peak_bytes(two_at_once, "cpu") <= 8000 + small


@pytest.mark.parametrize("form", candidates.FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_hold_nothing_of_the_size_of_the_inputs(form: str, dtype: str) -> None:
    shape = (4, 4, 32, 32)
    ours = bench_memory.measure(form, "value_and_grad", "cpu", dtype, shape, "cpu")
    assert ours["gradient_bytes"] == candidates.FORMS[form].wanted * ours["input_bytes"]
    assert ours["extra_bytes"] < 0.01 * ours["input_bytes"]
    eager = bench_memory.measure(form, "eager", "torch", dtype, shape, "cpu")
    assert eager["extra_bytes"] >= ours["input_bytes"]


def test_a_sweep_notes_medians_quartiles_and_shares() -> None:
    runs = {name: candidates.candidate("gaussian", "value_and_grad", name) for name in ("cpu", "torch")}
    found = bench_scaling.sweep(SHAPE, runs, rounds=5, rotating=1 << 14)
    assert found["bytes"] == 4 * math.prod(SHAPE) and found["pairs"] == 3
    for name, (low, high) in found["quartiles"].items():
        assert 0 < low <= found["medians"][name] <= high
    assert set(found["share"]) == {"cpu", "torch"} and found["share"]["torch"] < found["share"]["cpu"]


def test_a_sweep_refuses_a_wrong_candidate() -> None:
    with pytest.raises(AssertionError):
        bench_scaling.sweep(SHAPE, {"wrong": lambda a, b: (a.sum().detach(), b.detach())}, rounds=1, rotating=1)


def test_sweeps_reach_512_mib() -> None:
    assert 4 * 16384 * max(bench_scaling.BATCHES) == 512 << 20
    assert all(len(names) == count for count, names in bench_scaling.CONCEPTS.items())


def test_a_step_of_several_concepts_is_timed() -> None:
    found = bench_scaling.erasure_step(("three", "seven"), steps=2)
    assert found["concepts"] == 2 and found["step"] > 0 and found["batch"] == 16


def test_the_pieces_of_a_call_do_the_same_work() -> None:
    pred, target = (torch.randn(SHAPE) for _ in range(2))
    calls = host_levels.pieces(pred, target, "cpu")
    outcomes = [calls[name]() for name in host_levels.PIECES[:3]]
    for value, grad in outcomes[1:]:
        assert torch.equal(value, outcomes[0][0]) and torch.equal(grad, outcomes[0][1])
    # The module is as it was before its call was noted.
    assert type(cpu._compiled).__name__ == "module"


def test_a_launch_is_the_call_that_the_kernels_make() -> None:
    pred, target = (torch.randn(SHAPE) for _ in range(2))
    call = GaussianCall(pred, target, fk.get_divergence(host_levels.DIVERGENCE).gaussian_profile)
    launch = host_levels.launch_of(cpu, call)
    (given,) = (cell.cell_contents for cell in launch.__closure__ if isinstance(cell.cell_contents, tuple))
    value, grad = given[-3], given[-1]
    grad.zero_()
    launch()
    expected = fk.gaussian_divergence_value_and_grad(pred, target, host_levels.DIVERGENCE)
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


def test_parts_add_up_to_the_call() -> None:
    medians = {"call": 10.0, "dispatch": 6.0, "kernels": 5.0, "launch": 3.0}
    parts = host_levels.parts(medians)
    assert parts == {"checks": 4.0, "choice and dispatch": 1.0, "allocation and arguments": 2.0, "launch": 3.0}
    assert sum(parts.values()) == medians["call"]


@pytest.mark.parametrize("name", ["bench_losses", "bench_host", "bench_memory", "bench_scaling"])
def test_a_suite_says_by_which_command_it_runs(name: str) -> None:
    text = importlib.import_module(name).__doc__
    assert f"{name}.py`" in text
