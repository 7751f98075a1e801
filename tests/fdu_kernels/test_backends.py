"""The choice of a backend: argument before context before environment, and refusals that give every reason."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch._dynamo.exc import Unsupported

import fdu_kernels as fk
from fdu_kernels import registry
from fdu_kernels.calls import GaussianCall
from fdu_kernels.kernels.reference import torch_backend as reference
from fdu_kernels.registry import choose_backend

CALL = GaussianCall(torch.ones(2), torch.ones(2), fk.get_divergence("kl").gaussian_profile)


def fake(unavailable: str | None = None, unsuitable: str | None = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        why_unavailable=lambda: unavailable,
        why_unsuitable=lambda kind: unsuitable,
        gaussian_forward=lambda call: (torch.full((2,), 7.0), None),
    )


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Three more backends: one that cannot run, one that can, one that takes no call."""
    found: dict[str, object] = {
        "absent": fake(unavailable="no such device"),
        "picky": fake(unsuitable="only float8"),
        "other": fake(),
        "torch": reference,
    }
    monkeypatch.setattr(registry, "PLACES", found)
    for cache in (registry._fastest, registry.backend_named):
        cache.cache_clear()
    yield found
    for cache in (registry._fastest, registry.backend_named):
        cache.cache_clear()


def test_what_can_run_here_computes_and_what_cannot_says_why() -> None:
    pred, target = torch.tensor([[0.5, 2.0]]), torch.zeros(1, 2)
    expected = 1 - math.exp(-(0.25 + 4) / 2 / 8)  # squared_hellinger of the mean of squares
    computed = set()
    for name, reason in fk.backends().items():
        try:
            value = fk.gaussian_divergence(pred, target, backend=name)
        except RuntimeError as error:
            assert reason is None or reason in str(error)  # it cannot run here, or takes no tensors of the CPU
        else:
            assert reason is None and value.item() == pytest.approx(expected, rel=1e-5)
            computed.add(name)
    assert "torch" in computed


def test_reasons(modules: dict[str, object]) -> None:
    assert fk.backends() == {"absent": "no such device", "picky": None, "other": None, "torch": None}


def test_order_of_wishes(modules: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(2)
    assert choose_backend(None, CALL) == "other"
    monkeypatch.setenv("FDU_BACKEND", "torch")
    assert choose_backend(None, CALL) == "torch"
    with fk.use_backend("other"):
        assert choose_backend(None, CALL) == "other"
        assert choose_backend("torch", CALL) == "torch"
        with fk.use_backend("torch"):
            assert choose_backend(None, CALL) == "torch"
        assert choose_backend(None, CALL) == "other"
        assert fk.gaussian_divergence(tensor, tensor) == 7
    assert choose_backend(None, CALL) == "torch"


@pytest.mark.parametrize("is_built", [True, False])
def test_cuda_comes_first_where_it_is_built(
    modules: dict[str, object], monkeypatch: pytest.MonkeyPatch, is_built: bool
) -> None:
    cuda = fake()
    cuda.is_built = lambda: is_built
    monkeypatch.setattr(registry, "PLACES", {**modules, "cuda": cuda})
    assert choose_backend(None, CALL) == ("cuda" if is_built else "other")


def test_the_context_ends_with_an_error(modules: dict[str, object]) -> None:
    with pytest.raises(KeyError), fk.use_backend("torch"):
        raise KeyError
    assert choose_backend(None, CALL) == "other"


def test_refusals(modules: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(2)
    everything = r"absent \(no such device\), picky \(can run\), other \(can run\), torch \(can run\)"
    with pytest.raises(ValueError, match="backend asks.*unknown backend 'tritn'; known: absent, picky, other,"):
        fk.gaussian_divergence(tensor, tensor, backend="tritn")
    with pytest.raises(ValueError, match="use_backend asks.*unknown backend 'tritn'"):
        fk.use_backend("tritn").__enter__()
    with pytest.raises(RuntimeError, match=f"use_backend asks for 'absent', which cannot run here.*{everything}"):
        fk.use_backend("absent").__enter__()
    compiled = torch.compile(lambda: fk.use_backend("other").__enter__(), fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match="compiled code cannot call use_backend; pass backend="):
        compiled()
    with pytest.raises(RuntimeError, match="backend asks.*'picky'.*cannot take.*call: only float8"):
        fk.gaussian_divergence(tensor, tensor, backend="picky")
    with mock.patch("os.environ", {"FDU_BACKEND": "tritn"}), pytest.raises(ValueError, match="FDU_BACKEND asks for"):
        fk.gaussian_divergence(tensor, tensor)
    monkeypatch.setenv("FDU_BACKEND", "absent")
    with pytest.raises(RuntimeError, match="FDU_BACKEND asks.*'absent'"):
        fk.gaussian_divergence(tensor, tensor)


def test_nothing_fits(modules: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "PLACES", {name: modules[name] for name in ("absent", "picky")})
    with pytest.raises(RuntimeError, match=r"no backend.*take.*call.*absent \(no.*device\)"):
        choose_backend(None, CALL)


def test_a_module_can_name_its_backend(modules: dict[str, object]) -> None:
    loss = fk.GaussianDivergenceLoss(backend="absent")
    with pytest.raises(RuntimeError, match="backend asks.*'absent'.*cannot run here"):
        loss(torch.ones(2), torch.zeros(2))
