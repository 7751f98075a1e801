"""What a long run needs: memory stays flat over many calls; forked processes and deterministic mode compute."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import fdu_kernels as fk

CALLS = int(os.environ.get("FDU_STEADY_CALLS", "2000"))
"""Of each loss on each backend; make soak asks for 100,000."""
GROWTH = 1 << 18
"""Bytes: of 2000 calls 131 per call, which is less than a tensor or a node of a graph takes."""

LOSSES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "gaussian": lambda pred, target, backend: fk.gaussian_divergence(
        pred, target, "jensen_shannon", sigma=0.5, backend=backend
    ),
    "variational": lambda pred, target, backend: fk.variational_divergence(
        pred, target, "squared_hellinger", backend=backend
    ),
    "model": lambda pred, target, backend: fk.variational_model_loss(pred, "squared_hellinger", backend=backend),
    "ratio": lambda pred, target, backend: fk.density_ratio_divergence(pred, "squared_hellinger", backend=backend),
}


def pair(backend: str) -> tuple[Tensor, Tensor]:
    device = "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(4, 64, generator=generator).to(device) for _ in range(2))
    return pred.requires_grad_(), target


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=fk.backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here."""
    reason = fk.backends()[request.param]
    if reason is not None:
        pytest.skip(str(reason))
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_memory_stays_flat_over_many_calls(loss: str, backend: str) -> None:
    pred, target = pair(backend)

    def call(times: int) -> None:
        for _ in range(times):
            LOSSES[loss](pred, target, backend).backward()
            pred.grad = None

    calls = CALLS if backend != "triton" or torch.cuda.is_available() else CALLS // 100  # the interpreter is slow
    call(calls // 2)
    before = resident()
    call(calls)
    assert resident() - before < GROWTH


class Losses(Dataset[Tensor]):
    """Value and gradient of a loss, computed by whoever asks."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        pred, target = pair(self.backend)
        pred = (pred.detach() + index).requires_grad_()
        loss = LOSSES["gaussian"](pred, target, self.backend)
        loss.backward()
        assert pred.grad is not None
        return torch.cat([loss.detach().reshape(1), pred.grad.flatten()])


def test_forked_workers_of_a_data_loader_compute_what_this_process_does(backend: str) -> None:
    if pair(backend)[0].is_cuda:
        pytest.skip("a forked process cannot use CUDA")
    data = Losses(backend)
    here = torch.stack([data[index] for index in range(len(data))])  # also starts the threads of this process
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), here)


def test_deterministic_algorithms_are_all_there(backend: str) -> None:
    pred, target = pair(backend)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for loss in LOSSES.values():
            first, again = (torch.autograd.grad(loss(pred, target, backend), pred)[0] for _ in range(2))
            assert torch.equal(first, again)
    finally:
        torch.use_deterministic_algorithms(before)
