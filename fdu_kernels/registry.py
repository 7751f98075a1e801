"""The choice of a backend: the names, the ways to request one, and the order of preference.

A backend is a module, or an object, that provides what :class:`Backend` lists. To add one, write its file and add its
line to PLACES: eager calls, autograd, torch.compile, torch.func and the checks come with it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import os
from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor

from fdu_kernels.calls import ExpectationCall, GaussianCall, Kind
from fdu_kernels.internals import held_constant

ENVIRONMENT_VARIABLE = "FDU_BACKEND"
PLACES: dict[str, str | Backend] = {
    "triton": ".kernels.triton",
    "cuda": ".kernels.native:cuda",
    "cpu": ".kernels.native:cpu",
    "torch": ".kernels.reference:torch_backend",
}
"""Name -> module, module:object or the backend, the preferred first. A module is imported when first asked for."""
PREFERRED_WHEN_BUILT = "cuda"
"""Comes first where no call has to wait for its build: it holds larger samples on chip than Triton can, which has no
clusters of programs, and a launch costs the host less."""


class Backend(Protocol):
    """Six functions of a call; calls arrive checked. "acc" is float32, or float64 where an input is float64.

    Sums are accumulated in acc or better, in a fixed order: a result is the same to the last bit on every run. On the
    CPU the order depends on shapes, strides, dtypes and instruction set, and not on the number of threads; on a GPU on
    shapes, strides, dtypes, alignment and the device. Nothing here makes the host wait. A gradient has the dtype of its
    input and is rounded once.

    FUSES_FORWARD: whether the forward of autograd should compute the gradient as well. It pays where reading the
        upstream gradient costs nothing (the CPU): the usual 1.0 then needs no second pass.
    Where call.s is not None, forward and value and gradient of a Gaussian loss write s [B] there; it is contiguous.

    why_unavailable: why it cannot run on this machine, or None. Cheap: the answer is asked for at every call.
    why_unsuitable: why it cannot take calls of this kind, or None.
    gaussian_forward: weight h(s) [B] and 2 weight h'(s) / (sigma^2 Z) [B], both acc. Reads pred and target once.
    gaussian_backward: coefficient_b mask (pred - target); coefficient [B] acc.
    gaussian_value_and_grad: the reduced loss ([B] for "none", else []; acc), its sum's gradient times grad_scale.
    expectation_forward: the value: of the shape of v for "none", else []; acc.
    expectation_backward: the gradient in v; upstream is [] acc, or of the shape of v for reduction "none".
    expectation_value_and_grad: the value, and the gradient of its sum times grad_scale, in one pass.
    """

    FUSES_FORWARD: bool

    def why_unavailable(self) -> str | None: ...
    def why_unsuitable(self, kind: Kind) -> str | None: ...
    def gaussian_forward(self, call: GaussianCall) -> tuple[Tensor, Tensor]: ...
    def gaussian_backward(self, call: GaussianCall, coefficient: Tensor) -> Tensor: ...
    def gaussian_value_and_grad(self, call: GaussianCall, grad_out: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
    def expectation_forward(self, call: ExpectationCall) -> Tensor: ...
    def expectation_backward(self, call: ExpectationCall, upstream: Tensor) -> Tensor: ...
    def expectation_value_and_grad(self, call: ExpectationCall) -> tuple[Tensor, Tensor]: ...


_logger = logging.getLogger("fdu_kernels")
_variable = os.environ.encodekey(ENVIRONMENT_VARIABLE)
_wish: contextvars.ContextVar[str | None] = contextvars.ContextVar("fdu_kernels_backend", default=None)


@functools.cache
def backend_named(name: str) -> Backend:
    """The backend of that name."""
    place = PLACES[name]
    if not isinstance(place, str):
        return place
    module, _, attribute = place.partition(":")
    found = importlib.import_module(module, __package__)
    return cast(Backend, getattr(found, attribute) if attribute else found)


def backends() -> dict[str, str | None]:
    """Each backend by name: None if it can run here, else the reason why not. The preferred comes first."""
    return {name: backend_named(name).why_unavailable() for name in PLACES}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use this backend inside the block. Blocks nest; threads and tasks each have their own choice.

    Raises ValueError for an unknown backend; RuntimeError if it cannot run here (with the reasons of all backends),
    or if the block is inside compiled code.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("compiled code cannot call use_backend; pass backend=... or call that code in its block")
    _require(name, "use_backend")
    token = _wish.set(name)
    try:
        yield
    finally:
        _wish.reset(token)


def choose_backend(name: str | None, call: GaussianCall | ExpectationCall) -> str:
    """The backend for one call: the argument, else use_backend, else FDU_BACKEND, else the first that fits.

    Compiled code keeps its choice. ValueError: there is no such backend; RuntimeError: it cannot run or take this call.
    """
    return _choose(name, *call.kind())


@held_constant
def _choose(name: str | None, device: torch.device, dtype: torch.dtype, other: torch.dtype, form: str) -> str:
    origin = "backend"
    if name is None:
        name, origin = _wish.get(), "use_backend"
    # Asking os.environ for what is not there raises and catches an error inside: a microsecond of every call.
    if name is None and _variable in getattr(os.environ, "_data", (_variable,)):
        name, origin = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is None:
        return _fastest(device, dtype, other, form)
    reason = _require(name, origin).why_unsuitable(Kind(device, dtype, other, form))
    if reason is not None:
        raise RuntimeError(f"{origin} asks for {name!r}, which cannot take this call: {reason}")
    return name


@functools.lru_cache(maxsize=1024)
def _fastest(device: torch.device, dtype: torch.dtype, other: torch.dtype, form: str) -> str:
    """The first backend that fits; what was found is logged once."""
    kind = Kind(device, dtype, other, form)
    names = list(PLACES)
    if PREFERRED_WHEN_BUILT in names and getattr(backend_named(PREFERRED_WHEN_BUILT), "is_built", bool)():
        names.sort(key=lambda name: name != PREFERRED_WHEN_BUILT)
    for name in names:
        backend = backend_named(name)
        if backend.why_unavailable() is None and backend.why_unsuitable(kind) is None:
            if _logger.isEnabledFor(logging.INFO):  # to report on all of them may take a build
                _logger.info("%s computes %s losses of %s on %s; %s", name, form, dtype, device, _report())
            return name
    raise RuntimeError(f"no backend can take this call; {_report()}")


def check_backend(name: str | None, origin: str = "backend") -> None:
    """Raise ValueError if there is no backend of that name; it may still be unable to run here."""
    if name is not None and name not in PLACES:
        raise ValueError(f"{origin} asks for the unknown backend {name!r}; known: {', '.join(PLACES)}")


def _require(name: str, origin: str) -> Backend:
    check_backend(name, origin)
    backend = backend_named(name)
    if backend.why_unavailable() is not None:
        raise RuntimeError(f"{origin} asks for {name!r}, which cannot run here; {_report()}")
    return backend


def _report() -> str:
    states = (f"{name} ({reason or 'can run'})" for name, reason in backends().items())
    return f"the backends are: {', '.join(states)}"
