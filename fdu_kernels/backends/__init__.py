"""Which backend computes: the registry, the ways to ask for one, and the choice.

A backend fulfils :class:`Backend`: the reference does by itself, the fused ones through :mod:`fdu_kernels.ops`, which
puts autograd around the kernels of a module of this folder. To add one, write the module (kernels.py says what it has)
and add its line to ``fdu_kernels.ops.KERNELS``; nothing else changes.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fdu_kernels.backends import reference
from fdu_kernels.divergence import Divergence
from fdu_kernels.ops import KERNELS, FusedBackend

ENVIRONMENT_VARIABLE = "FDU_BACKEND"


class Backend(Protocol):
    """What a backend module has. Arguments arrive checked; tensors of value and sum are in the accumulation dtype."""

    def why_unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None. Cheap: the answer is asked for at every call."""

    def why_unsuitable(self, device: torch.device, dtype: torch.dtype, own: str | None, form: str) -> str | None:
        """Why it cannot take this call, or None. ``own``: a user's divergence, by key; form: "gaussian", "critic"."""

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


REGISTRY: dict[str, Backend] = {**{name: FusedBackend(name) for name in KERNELS}, "torch": reference}
"""Name -> backend, the preferred first. What is slow to import or to build is left to the first use."""

_logger = logging.getLogger("fdu_kernels")
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


def choose_backend(name: str | None, tensor: Tensor, divergence: Divergence, form: str) -> Backend:
    """The backend for one call: the argument, else use_backend, else FDU_BACKEND, else the first that fits.

    Compiled code keeps the choice it was traced with.

    Args:
        form: "gaussian", or "critic" for a function of density-ratio estimates.

    Raises:
        ValueError: a backend was asked for that does not exist.
        RuntimeError: a backend was asked for that cannot run or cannot take this call.
    """
    own = None if divergence.custom is None else divergence.key
    return REGISTRY[_choose(name, tensor.device, tensor.dtype, own, form)]


@torch.compiler.assume_constant_result
def _choose(name: str | None, device: torch.device, dtype: torch.dtype, own: str | None, form: str) -> str:
    """The name of the backend. ``own`` is the key of a user's divergence; the catalogue's are all alike here."""
    origin = "backend"
    if name is None:
        name, origin = _wish.get(), "use_backend"
    if name is None:
        name, origin = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is None:
        return _fastest(device, dtype, own, form)
    reason = _require(name, origin).why_unsuitable(device, dtype, own, form)
    if reason is not None:
        raise RuntimeError(f"{origin} asks for {name!r}, which cannot take this call: {reason}")
    return name


@functools.lru_cache(maxsize=1024)
def _fastest(device: torch.device, dtype: torch.dtype, own: str | None, form: str) -> str:
    """The first backend that fits; what was found is logged once."""
    for name, backend in REGISTRY.items():
        if backend.why_unavailable() is None and backend.why_unsuitable(device, dtype, own, form) is None:
            if _logger.isEnabledFor(logging.INFO):  # to report on all of them may take a build
                _logger.info("%s computes %s losses of %s on %s; %s", name, form, dtype, device, _report())
            return name
    raise RuntimeError(f"no backend can take this call; {_report()}")


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
