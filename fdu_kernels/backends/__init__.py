"""Which backend computes: the registry, the ways to ask for one, and the choice.

A backend is a module of this folder that fulfils :class:`Backend`. To add one, write the module and add its line to
``REGISTRY``; nothing else changes.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fdu_kernels.backends import reference
from fdu_kernels.divergence import Divergence

ENVIRONMENT_VARIABLE = "FDU_BACKEND"


class Backend(Protocol):
    """What a backend module has. Arguments arrive checked; tensors of value and sum are in the accumulation dtype."""

    def why_unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None. Cheap: the answer is asked for at every call."""

    def why_unsuitable(self, tensor: Tensor, divergence: Divergence) -> str | None:
        """Why it cannot take this call (device, dtype, a user's generator), or None."""

    def gaussian_divergence(
        self,
        pred: Tensor,
        target: Tensor,
        divergence: Divergence,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
        reduction: str,
    ) -> Tensor:
        """The loss, differentiable in pred."""

    def gaussian_divergence_value_and_grad(
        self,
        pred: Tensor,
        target: Tensor,
        divergence: Divergence,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
        reduction: str,
        grad_scale: float | Tensor,
        grad_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The loss and the gradient of its sum."""

    def variational_divergence(
        self,
        log_ratio_p: Tensor | None,
        log_ratio_q: Tensor,
        divergence: Divergence,
        mask: Tensor | None,
        parametrization: str,
        reduction: str,
    ) -> Tensor:
        """E_p[A] - E_q[B], or -E_q[B] where log_ratio_p is None, differentiable in both."""

    def variational_divergence_value_and_grad(
        self,
        log_ratio_p: Tensor,
        log_ratio_q: Tensor,
        divergence: Divergence,
        mask: Tensor | None,
        parametrization: str,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The bound and the gradients of its sum."""

    def density_ratio_divergence(
        self, log_ratio: Tensor, divergence: Divergence, samples_from: str, weight: Tensor | None, reduction: str
    ) -> Tensor:
        """The estimate, differentiable in log_ratio."""

    def density_ratio_divergence_value_and_grad(
        self,
        log_ratio: Tensor,
        divergence: Divergence,
        samples_from: str,
        weight: Tensor | None,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The estimate and the gradient of its sum."""


REGISTRY: dict[str, Backend] = {
    "torch": reference,
}
"""Name -> module, the preferred first. A module leaves what is slow to import to its first use."""

_wish: contextvars.ContextVar[str | None] = contextvars.ContextVar("fdu_kernels_backend", default=None)


def backends() -> dict[str, str | None]:
    """Every backend by name: None if it can run here, else the reason why not. The preferred comes first."""
    return {name: backend.why_unavailable() for name, backend in REGISTRY.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend inside the block. Blocks nest, and threads and tasks have their own choice.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: that backend cannot run here (with the reasons of all).
    """
    _require(name, "use_backend")
    token = _wish.set(name)
    try:
        yield
    finally:
        _wish.reset(token)


def choose_backend(name: str | None, tensor: Tensor, divergence: Divergence) -> Backend:
    """The backend for one call: the argument, else use_backend, else FDU_BACKEND, else the first that fits.

    Raises:
        ValueError: a backend was asked for that does not exist.
        RuntimeError: a backend was asked for that cannot run or cannot take this call.
    """
    wish, origin = (name, "backend") if name is not None else _standing_wish()
    if wish is not None:
        backend = _require(wish, origin)
        reason = backend.why_unsuitable(tensor, divergence)
        if reason is not None:
            raise RuntimeError(f"{origin} asks for {wish!r}, which cannot take this call: {reason}")
        return backend
    for backend in REGISTRY.values():
        if backend.why_unavailable() is None and backend.why_unsuitable(tensor, divergence) is None:
            return backend
    raise RuntimeError(f"no backend can take this call; {_report()}")


@torch.compiler.assume_constant_result
def _standing_wish() -> tuple[str | None, str]:
    """The wish of use_backend or the environment. Compiled code keeps the one it was traced with."""
    wish = _wish.get()
    if wish is not None:
        return wish, "use_backend"
    return os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE


def _require(name: str, origin: str) -> Backend:
    if name not in REGISTRY:
        raise ValueError(f"{origin} asks for the unknown backend {name!r}; known: {', '.join(REGISTRY)}")
    backend = REGISTRY[name]
    if backend.why_unavailable() is not None:
        raise RuntimeError(f"{origin} asks for {name!r}, which cannot run here; {_report()}")
    return backend


def _report() -> str:
    states = (f"{name} ({reason or 'can run'})" for name, reason in backends().items())
    return f"the backends are: {', '.join(states)}"
