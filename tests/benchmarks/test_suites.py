"""The benchmarks at tiny size: they measure what they say, and check every competitor before they time it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_closed_form
import bench_evaluation
import bench_host
import bench_memory
import bench_scaling
import competitors
import pytest
import records
import timing
import torch
from torch import Tensor

import fdu
import fdu_kernels as fk
from fdu_kernels.calls import GaussianCall
from fdu_kernels.kernels.native import cpu

SHAPE = (3, 4, 8, 8)
LOSSES = Path(timing.__file__).with_name("bench_losses.py")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("form", competitors.FORMS)
@pytest.mark.parametrize("dtype", competitors.DTYPES)
def test_ours_pass_the_check_that_precedes_every_timing(form: str, dtype: str) -> None:
    a, b = competitors.inputs(SHAPE, competitors.DTYPES[dtype], "cpu")
    for which in ("eager", "autograd", "value_and_grad"):
        competitors.check(competitors.candidate(form, which, "cpu"), form, a, b)


def test_a_wrong_candidate_does_not_pass() -> None:
    a, b = competitors.inputs(SHAPE, torch.float32, "cpu")
    right = competitors.candidate("gaussian", "value_and_grad", "cpu")

    def wrong_value(a: Tensor, b: Tensor) -> competitors.Outcome:
        value, grad = right(a, b)
        return value * 1.01, grad

    def wrong_element(a: Tensor, b: Tensor) -> competitors.Outcome:
        value, grad = right(a, b)
        grad.view(-1)[7] += 1e-3
        return value, grad

    for wrong in (wrong_value, wrong_element):
        with pytest.raises(AssertionError):
            competitors.check(wrong, "gaussian", a, b)


def test_inputs_differ_by_seed_and_not_by_call() -> None:
    (a, b), (c, _), (d, _) = (competitors.inputs(SHAPE, torch.float32, "cpu", seed) for seed in (0, 1, 0))
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
    assert 4000 <= bench_memory.peak_bytes(two_after_each_other, "cpu") <= 4000 + small
    assert 8000 <= bench_memory.peak_bytes(two_at_once, "cpu") <= 8000 + small


@pytest.mark.parametrize("form", competitors.FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_hold_nothing_of_the_size_of_the_inputs(form: str, dtype: str) -> None:
    shape = (4, 4, 32, 32)
    wanted = competitors.FORMS[form].wanted
    pair = competitors.inputs(shape, competitors.DTYPES[dtype], "cpu", wanted=wanted)
    ours, eager = (
        bench_memory.measure(competitors.candidate(form, which, "cpu"), *pair) for which in ("value_and_grad", "eager")
    )
    assert ours["gradient_bytes"] == wanted * ours["input_bytes"]
    assert ours["extra_bytes"] < 0.01 * ours["input_bytes"]
    assert eager["extra_bytes"] >= ours["input_bytes"]


def test_a_sweep_notes_medians_quartiles_and_shares() -> None:
    runs = {name: competitors.candidate("gaussian", "value_and_grad", name) for name in ("cpu", "torch")}
    pairs = competitors.rotating("gaussian", SHAPE, torch.float32, "cpu", 1 << 14)
    found = timing.sweep("gaussian", runs, pairs, rounds=5)
    assert found["bytes"] == 4 * math.prod(SHAPE) and found["pairs"] == 3 and found["shape"] == list(SHAPE)
    for name, (low, high) in found["quartiles"].items():
        assert 0 < low <= found["medians"][name] <= high
    assert set(found["share"]) == {"cpu", "torch"} and found["share"]["torch"] < found["share"]["cpu"]


def test_a_share_compares_bandwidths_of_the_same_round(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"clone": [1.0, 2.0, 10.0], "ours": [2.0, 3.0, 15.0]}
    monkeypatch.setattr(timing, "take_turns", lambda *_, **__: times)
    monkeypatch.setattr(timing, "check", lambda *_: None)
    pairs = competitors.rotating("gaussian", SHAPE, torch.float32, "cpu", 1)
    found = timing.sweep("gaussian", {"ours": lambda a, b: (a,)}, pairs, rounds=3)
    # 3N bytes against 2N: one and a half times clone's time is its bandwidth.
    assert found["share"]["ours"] == pytest.approx(1.0) and found["medians"] == {"clone": 2.0, "ours": 3.0}


def test_turns_take_the_next_inputs_and_warm_up() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: lambda number, name=name: seen.append((name, number)) for name in ("a", "b")}
    turns = ((number,) for number in range(100))
    times = timing.take_turns(calls, 3, 2, turns, before=lambda call, number: seen.append(("before", number)))
    assert [len(taken) for taken in times.values()] == [3, 3]
    assert seen[:6] == [("before", 0), ("a", 0), ("a", 0), ("before", 1), ("b", 1), ("b", 1)]
    assert len(seen) == 3 * 2 * (3 + 2)


def test_a_sweep_refuses_a_wrong_competitor() -> None:
    pairs = competitors.rotating("gaussian", SHAPE, torch.float32, "cpu", 1)
    with pytest.raises(AssertionError):
        timing.sweep("gaussian", {"wrong": lambda a, b: (a.sum().detach(), b.detach())}, pairs, rounds=1)


MINE = """
from competitors import competitor

@competitor("gaussian")
def mine(pred, target):
    s = (pred - target).square().flatten(1).mean(1) / 0.7**2
    return (1 - (s / -8).exp()).mean()

@competitor("mse")
def wrong(pred, target):
    return (pred - target).abs().mean()
"""


@pytest.mark.slow
def test_your_own_loss_is_checked_timed_printed_and_kept(tmp_path: Path) -> None:
    mine, path = tmp_path / "mine.py", tmp_path / "record.json"
    mine.write_text(MINE)
    command = [sys.executable, str(LOSSES), "-k", "(gaussian or mse) and float32 and 2x4x64x64"]
    # Not as a worker of xdist.
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--competitors", str(mine), "--record", str(path)],
        capture_output=True, text=True, env={**own, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    # The wrong one of mse fails by itself.
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    (row,) = records.read(path)["losses"]["rows"]
    assert row["form"] == "gaussian" and row["shape"] == [2, 4, 64, 64]
    names = {"eager", "compiled", "mine", "autograd", "value_and_grad", "into_buffer"}
    assert set(row["medians"]) == names and row["medians"]["value_and_grad"] < row["medians"]["mine"]
    printed = done.stdout.splitlines()
    assert "CPU (" in printed[0] and torch.__version__ in printed[0]
    for name in names:
        (line,) = [line for line in printed if line.split()[:1] == [name] and "GB/s" in line]
        assert f"{row['medians'][name] * 1e6:.1f} us" in line
    assert any("3 passes" in line and "0.375 MiB" in line for line in printed)  # three of 2x4x64x64 in float32


def test_a_loss_of_your_own_has_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competitors, "FORMS", dict(competitors.FORMS))

    @competitors.loss(wanted=1, passes=3)
    def absolute(pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).abs().mean()

    @competitors.competitor("absolute", gradients=True)
    def by_hand(pred: Tensor, target: Tensor) -> competitors.Outcome:
        return absolute(pred, target).detach(), (pred - target).sign().detach() / pred.numel()

    runs = competitors.competitors_of("absolute", ["cpu"], compiler="eager")
    assert list(runs) == ["eager", "compiled", "by_hand"]
    for run in runs.values():
        competitors.check(run, "absolute", *competitors.inputs(SHAPE, torch.float32, "cpu", wanted=1))
    with pytest.raises(ValueError, match=r"gausian.*gaussian"):
        competitors.competitor("gausian")


def test_a_step_of_several_concepts_is_timed() -> None:
    found = bench_scaling.erasure_step(bench_scaling.CONCEPTS[:2], steps=2)
    assert found["concepts"] == 2 and found["step"] > 0 and found["batch"] == 16


def test_the_pieces_of_a_call_do_the_same_work() -> None:
    pred, target = (torch.randn(SHAPE) for _ in range(2))
    calls = bench_host.pieces(pred, target, "cpu")
    outcomes = [calls[name]() for name in bench_host.PIECES[:3]]
    for value, grad in outcomes[1:]:
        assert torch.equal(value, outcomes[0][0]) and torch.equal(grad, outcomes[0][1])
    # The module is as it was before its call was noted.
    assert type(cpu._compiled).__name__ == "module"


def test_a_launch_is_the_call_that_the_kernels_make() -> None:
    pred, target = (torch.randn(SHAPE) for _ in range(2))
    call = GaussianCall(pred, target, fk.get_divergence(bench_host.DIVERGENCE).gaussian_profile)
    launch = bench_host.launch_of(cpu, call)
    (given,) = (cell.cell_contents for cell in launch.__closure__ if isinstance(cell.cell_contents, tuple))
    value, grad = given[-4], given[-2]  # between and behind them, what is not asked for
    grad.zero_()
    launch()
    expected = fk.gaussian_divergence_value_and_grad(pred, target, bench_host.DIVERGENCE)
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


def test_parts_add_up_to_the_call() -> None:
    medians = {"call": 10.0, "dispatch": 6.0, "kernels": 5.0, "launch": 3.0}
    parts = bench_host.parts(medians)
    assert parts == {"checks": 4.0, "choice and dispatch": 1.0, "allocation and arguments": 2.0, "launch": 3.0}
    assert sum(parts.values()) == medians["call"]


def test_an_erasure_without_training_is_timed_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cpu.json"
    monkeypatch.setattr("sys.argv", ["", "--scaled", "--concepts", "3", "--record", str(path)])
    bench_closed_form.main()
    found = records.read(path)["closed_form"]
    assert found["concepts"] == 3 and list(found["seconds"])[-1] == "Stable Diffusion 1.5, 3 concepts, own anchors"
    assert all(0 < seconds < 60 for seconds in found["seconds"].values())
    assert "emoji, fox to wolf" in (printed := capsys.readouterr().out) and "holds" in printed


def test_an_evaluation_is_timed_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(pipeline: Any, probes: list[fdu.Probe], images: int, *others: Any, **sampling: Any) -> fdu.Draws:
        assert len({probe.name for probe in probes}) == 10
        return fdu.Draws([torch.rand(images, 3, 32, 32) for _ in probes])

    monkeypatch.setattr(fdu, "draw", draw)
    path = tmp_path / "cpu.json"
    monkeypatch.setattr("sys.argv", ["bench_evaluation.py", "--images_per_class", "2", "--record", str(path)])
    bench_evaluation.main()
    found = records.read(path)["evaluation"]
    assert (found["classes"], found["images_per_class"], len(found["seconds"])) == (10, 2, 3)
    assert "10 classes x 2 images" in (printed := capsys.readouterr().out) and "holds" in printed
