"""What a call costs the host at the size of latents, by part: ``python bench_host.py``.

Times four nested pieces of one call, in turn, on one thread. The first is the function of ``fdu_kernels`` with its
checks. The second is the dispatch: the choice of a backend and of the way to it. The third is the backend's own
function, which allocates outputs and lays out arguments. The last is the launch of the compiled operation into buffers
that exist. A part is the time of a piece minus that of the piece inside it. On the CPU the launch includes the
computation. On a GPU it returns before the device has finished.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timing
import torch
from competitors import Shape, fused_backends
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


def pieces(pred: Tensor, target: Tensor, name: str) -> dict[str, Callable[[], object]]:
    """The pieces of value_and_grad, the outer ones first, and what lies beside them."""
    backend, held = backend_named(name), GaussianCall(pred, target, fk.get_divergence(DIVERGENCE).gaussian_profile)
    held.checked()
    # Nobody names the backend that is chosen anyway.
    asked = None if choose_backend(None, held) == name else name
    grad, leaf = torch.empty_like(pred), pred.detach().clone().requires_grad_()
    value_and_grad, mse = fk.gaussian_divergence_value_and_grad, torch.nn.functional.mse_loss

    def autograd() -> object:
        return torch.autograd.grad(fk.gaussian_divergence(leaf, target, DIVERGENCE, backend=asked), leaf)

    return {
        "call": lambda: value_and_grad(pred, target, DIVERGENCE, backend=asked),
        "dispatch": lambda: dispatch.gaussian_value_and_grad(held, None, asked),
        "kernels": lambda: backend.gaussian_value_and_grad(held, None),
        "launch": launch_of(backend, held),
        "checks alone": held.checked,
        "choice alone": lambda: choose_backend(None, held),
        "one allocation": lambda: torch.empty_like(pred),
        "call with grad_out": lambda: value_and_grad(pred, target, DIVERGENCE, backend=asked, grad_out=grad),
        "autograd, forward and backward": autograd,
        "F.mse_loss, forward and backward": lambda: torch.autograd.grad(mse(leaf, target), leaf),
    }


def launch_of(backend: Any, call: GaussianCall) -> Callable[[], object]:
    """The last piece: the compiled operation called exactly as the kernels' function calls it, to be repeated."""
    launches: list[Callable[[], object]] = []
    if isinstance(backend, CpuBackend):
        recorded: dict[str, Any] = {"_compiled": _Recorder(backend._compiled, launches)}
        holder: Any = backend
    else:
        from fdu_kernels.kernels.triton import gaussian as holder

        kernels = {name: value for name, value in vars(holder).items() if name.startswith("gaussian_")}
        recorded = {name: _Recorder(kernel, launches) for name, kernel in kernels.items() if hasattr(kernel, "run")}
    vars(holder).update(recorded)
    try:
        backend.gaussian_value_and_grad(call, None)
    finally:
        vars(holder).update({name: recorder.real for name, recorder in recorded.items()})
    assert launches, f"{holder} launched nothing"
    return launches[0] if len(launches) == 1 else lambda: [launch() for launch in launches]


class _Recorder:
    """A compiled module, or a Triton kernel, whose calls are noted."""

    def __init__(self, real: Any, launches: list[Callable[[], object]]) -> None:
        self.real, self.launches = real, launches

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        return self._noted(found) if callable(found) else found

    def __getitem__(self, grid: Any) -> Callable[..., object]:
        return self._noted(self.real[grid])

    def _noted(self, function: Callable[..., object]) -> Callable[..., object]:
        def call(*given: Any, **options: Any) -> object:
            self.launches.append(lambda: function(*given, **options))
            return function(*given, **options)

        return call


def measure(shape: Shape, backend: str, device: str = "cpu", rounds: int = 200, iterations: int = 20) -> dict[str, Any]:
    """Medians and least values of pieces, and the medians' differences as parts."""
    generator = torch.Generator(device).manual_seed(0)
    pred, target = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, DIVERGENCE, backend=backend)
    true, true_grad = fk.gaussian_divergence_value_and_grad(pred, target, DIVERGENCE, backend="torch")
    torch.testing.assert_close((value, grad), (true, true_grad), rtol=1e-4, atol=1e-7)

    def wait(call: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = timing.take_turns(pieces(pred, target, backend), rounds, iterations, before=wait)
    medians = {name: seconds * 1e6 for name, seconds in timing.medians(times).items()}
    return {
        "shape": list(shape),
        "backend": backend,
        "medians_us": medians,
        "least_us": {name: min(taken) * 1e6 for name, taken in times.items()},
        "parts_us": parts(medians),
    }


def parts(medians: dict[str, float]) -> dict[str, float]:
    """What each piece takes beyond the one that it contains."""
    inner = [*(medians[name] for name in PIECES[1:]), 0.0]
    return {part: medians[name] - inside for part, name, inside in zip(PARTS, PIECES, inner, strict=True)}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backend", fused_backends())
def test_parts(benchmark: timing.BenchmarkFixture, backend: str, shape: Shape) -> None:
    """Checks, dispatch, allocation and launch of value_and_grad."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at these sizes a second one is not woken
    try:
        found = benchmark.pedantic(measure, (shape, backend, "cpu" if backend == "cpu" else "cuda"), rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(form="host", **found)
    print(f"\n{backend} {'x'.join(map(str, shape))}, us of the host: parts of a call, then pieces")
    for name, taken in [*found["parts_us"].items(), *found["medians_us"].items()]:
        print(f"  {name:<34}{taken:8.1f}")


if __name__ == "__main__":
    raise SystemExit(timing.run_alone(__file__))
