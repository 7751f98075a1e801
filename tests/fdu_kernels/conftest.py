"""Golden values (h, h', A, B, A', B' in 40-digit arithmetic), one thread, no backend wished for, poisoned buffers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

VECTORS = Path(__file__).parent / "vectors"


def read_vectors(name: str, group: str = "divergences") -> dict[str, Tensor]:
    """Spelling of the divergence -> float64 columns."""
    rows = json.loads((VECTORS / f"{name}.json").read_text())[group]
    return {spelling: torch.tensor(values, dtype=torch.float64).T for spelling, values in rows.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``gaussian_row`` is (spelling, s, h, h'), ``variational_row`` (spelling, v, A, B, A', B').

    ``extreme_profile`` is as gaussian_row, with 0 for what is below 1e-300; ``extreme_critic`` as variational_row, with
    f(r) and f(r)/r behind. make_extremes.py makes them.
    """
    for fixture, place in {
        "gaussian_row": ("gaussian",),
        "variational_row": ("variational",),
        "extreme_profile": ("extremes", "profiles"),
        "extreme_critic": ("extremes", "ratios"),
    }.items():
        if fixture in metafunc.fixturenames:
            vectors = read_vectors(*place)
            metafunc.parametrize(fixture, [(key, *vectors[key]) for key in vectors], ids=list(vectors))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_wished_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FDU_BACKEND", raising=False)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN, so that an element that stays unwritten is seen."""

    def filling(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def create(*arguments: Any, **options: Any) -> Tensor:
            tensor = function(*arguments, **options)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return create

    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filling(getattr(owner, name)))
