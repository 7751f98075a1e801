"""The backends that compute the losses, and the choice among them.

A backend is a module of this folder with the functions of ``reference.py`` and ``unavailable() -> str | None``. Its
line in ``BACKENDS`` is all that registers it; the first one that can run is the default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from fdu_kernels.backends import reference

BACKENDS: Mapping[str, ModuleType] = {"torch": reference}
"""Name to module, the fastest first."""

ENVIRONMENT_VARIABLE = "FDU_BACKEND"

_wished: ContextVar[str | None] = ContextVar("fdu_backend", default=None)


def backends() -> dict[str, str | None]:
    """Every backend: None where it can run, else why not."""
    return {name: module.unavailable() for name, module in BACKENDS.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Compute with one backend within this context, which may be nested; ``backend=`` of a call goes before it.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here; the message says why.
    """
    find(name)
    token = _wished.set(name)
    try:
        yield
    finally:
        _wished.reset(token)


def find(name: str | None = None) -> ModuleType:
    """The backend of that name; without one that of ``use_backend``, of FDU_BACKEND, or the first that can run.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here; the message says why.
    """
    source = "backend"
    if name is None:
        name = _wished.get()
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is None:
        return next(module for module in BACKENDS.values() if module.unavailable() is None)
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        usable = [other for other, why in backends().items() if why is None]
        raise RuntimeError(f"{source} {name!r} cannot run here: {reason}; usable are {', '.join(usable)}")
    return BACKENDS[name]
