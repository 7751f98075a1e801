"""What a call costs the host, by part: nested pieces of the call that really run, each timed for itself.

``python benchmarks/host_levels.py`` prints a JSON object of microseconds for this checkout. Four pieces, each of which
contains the next: the function of ``fdu_kernels`` (its checks), the dispatch (the choice of a backend and of the way to
it), the backend's own function (outputs allocated, arguments laid out) and the launch: the compiled operation, into
buffers that exist. A part is what a piece takes beyond the one that it contains. On the CPU a launch computes as well;
on a GPU it returns before the device has done its work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels import dispatch
from fdu_kernels.calls import GaussianCall
from fdu_kernels.kernels.native import CpuBackend
from fdu_kernels.registry import backend_named, choose_backend

DIVERGENCE = "squared_hellinger"
SHAPES = ((1, 4, 64, 64), (4, 4, 64, 64), (1, 4, 128, 128))
"""Latents of Stable Diffusion 1.5, one and a batch, and of XL."""
PIECES = ("call", "dispatch", "kernels", "launch")
PARTS = ("checks", "choice and dispatch", "allocation and arguments", "launch")
"""What each piece takes beyond the next one."""
Calls = dict[str, Callable[[], object]]


def pieces(pred: Tensor, target: Tensor, name: str) -> Calls:
    """The pieces of value_and_grad, the outer ones first, and what lies beside them."""
    backend, held = backend_named(name), GaussianCall(pred, target, fk.get_divergence(DIVERGENCE).gaussian_profile)
    held.checked()
    # Nobody names the backend that is chosen anyway.
    asked = None if choose_backend(None, held) == name else name
    grad = torch.empty_like(pred)
    leaf = pred.detach().clone().requires_grad_()
    return {
        "call": lambda: fk.gaussian_divergence_value_and_grad(pred, target, DIVERGENCE, backend=asked),
        "dispatch": lambda: dispatch.gaussian_value_and_grad(held, None, asked),
        "kernels": lambda: backend.gaussian_value_and_grad(held, None),
        "launch": launch_of(backend, held),
        "checks alone": lambda: held.checked(),
        "choice alone": lambda: choose_backend(None, held),
        "one allocation": lambda: torch.empty_like(pred),
        "call with grad_out": lambda: fk.gaussian_divergence_value_and_grad(
            pred, target, DIVERGENCE, backend=asked, grad_out=grad
        ),
        "autograd, forward and backward": lambda: torch.autograd.grad(
            fk.gaussian_divergence(leaf, target, DIVERGENCE, backend=asked), leaf
        ),
        "F.mse_loss, forward and backward": lambda: torch.autograd.grad(
            torch.nn.functional.mse_loss(leaf, target), leaf
        ),
    }


def launch_of(backend: Any, call: GaussianCall) -> Callable[[], object]:
    """The last piece: the call of the compiled operation exactly as the kernels' function makes it, to be repeated."""
    if isinstance(backend, CpuBackend):
        compiled = _Recorder(backend._compiled)
        vars(backend)["_compiled"] = compiled
        try:
            backend.gaussian_value_and_grad(call, None)
        finally:
            vars(backend)["_compiled"] = compiled.real
        operation, given = compiled.calls[0]
        return lambda: operation(*given)
    from fdu_kernels.kernels.triton import launch_gaussian

    jitted = {name: kernel for name, kernel in vars(launch_gaussian).items() if hasattr(kernel, "run")}
    launches: list[Callable[[], object]] = []
    for name, kernel in jitted.items():
        setattr(launch_gaussian, name, _Launched(kernel, launches))
    try:
        backend.gaussian_value_and_grad(call, None)
    finally:
        for name, kernel in jitted.items():
            setattr(launch_gaussian, name, kernel)
    assert launches, "no kernel of launch_gaussian was found"
    return lambda: [launch() for launch in launches]


class _Recorder:
    """The compiled module, of which calls are noted with their arguments."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if not callable(found):
            return found

        def call(*given: Any) -> object:
            self.calls.append((found, given))
            return found(*given)

        return call


class _Launched:
    """A Triton kernel whose launches are noted."""

    def __init__(self, kernel: Any, launches: list[Callable[[], object]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        def launch(*given: Any, **options: Any) -> object:
            self.launches.append(lambda: self.kernel[grid](*given, **options))
            return self.kernel[grid](*given, **options)

        return launch


def microseconds(calls: Calls, rounds: int, iterations: int, wait: Callable[[], object]) -> dict[str, list[float]]:
    """Of each call in each round; the calls take turns. ``wait`` comes before each turn, and is not timed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(iterations):
                call()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - start) / iterations * 1e6)
    return times


def measure(
    shape: tuple[int, ...], backend: str, device: str = "cpu", rounds: int = 200, iterations: int = 20
) -> dict[str, Any]:
    """Medians and least values of pieces, and the medians' differences as parts."""
    generator = torch.Generator(device).manual_seed(0)
    pred, target = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, DIVERGENCE, backend=backend)
    true, true_grad = fk.gaussian_divergence_value_and_grad(pred, target, DIVERGENCE, backend="torch")
    torch.testing.assert_close((value, grad), (true, true_grad), rtol=1e-4, atol=1e-7)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times = microseconds(pieces(pred, target, backend), rounds, iterations, wait)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "shape": list(shape),
        "backend": backend,
        "medians_us": medians,
        "least_us": {name: min(taken) for name, taken in times.items()},
        "parts_us": parts(medians),
    }


def parts(medians: dict[str, float]) -> dict[str, float]:
    """What each piece takes beyond the one that it contains."""
    inner = [*(medians[name] for name in PIECES[1:]), 0.0]
    return {part: medians[name] - inside for part, name, inside in zip(PARTS, PIECES, inner, strict=True)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)  # at these sizes a second one is not woken
    where = "cpu" if options.backend == "cpu" else "cuda"
    print(json.dumps([measure(shape, options.backend, where, options.rounds) for shape in SHAPES]))


if __name__ == "__main__":
    main()
