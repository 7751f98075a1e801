"""Tests that need an NVIDIA GPU, and else only torch, triton, numpy and pytest; without one each is skipped by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fdu_kernels as fk

VECTORS = Path(__file__).parents[1] / "fdu_kernels" / "vectors"
HERE = Path(__file__).parent
FUSED = ("triton", "cuda")


def read_vectors(name: str) -> dict[str, Tensor]:
    """Spelling of the divergence -> float64 columns."""
    rows = json.loads((VECTORS / f"{name}.json").read_text())["divergences"]
    return {spelling: torch.tensor(values, dtype=torch.float64).T for spelling, values in rows.items()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU nothing here runs."""
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``gaussian_row`` is (spelling, s, h, h'), ``variational_row`` (spelling, v, A, B, A', B')."""
    for name in ("gaussian", "variational"):
        if f"{name}_row" in metafunc.fixturenames:
            vectors = read_vectors(name)
            metafunc.parametrize(f"{name}_row", [(key, *vectors[key]) for key in vectors], ids=list(vectors))


@pytest.fixture(params=FUSED)
def backend(request: pytest.FixtureRequest) -> str:
    """Each fused backend; one that cannot run on a machine with a GPU is a failure, not a skip."""
    reason = fk.backends().get(request.param, "not in this version")
    assert reason is None, f"{request.param} cannot run here: {reason}"
    return request.param
