"""The backend "cuda" without a GPU: csrc/cuda*.cu compiled for the host, its threads emulated as fibers.

Indices, plans, sums, tickets and barriers are the real ones; CUDA's words are those of cuda_emulation.h.
"""

from __future__ import annotations

import contextlib
import importlib.util
import types
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fdu_kernels import build, registry
from fdu_kernels.calls import Kind
from fdu_kernels.kernels.native import CudaBackend

HERE = Path(__file__).parent


def flags_of(plan: build.Recipe) -> tuple[str, list[str]]:
    """The compiler and its flags for the sources of a CUDA kernel."""
    compiler, _, flags = plan.objects["module.o"]
    # Ubuntu's compiler would check that longjmp stays on one stack.
    flags = [*flags, "-O1", "-Werror", "-U_FORTIFY_SOURCE", "-I", str(plan.sources), "-I", str(HERE)]
    return compiler, [*flags, '-DFDU_EMULATION="cuda_emulation.h"', "-x", "c++"]


def load() -> types.ModuleType:
    """The operations on CPU tensors, kept until the sources change, as the kernels are. BuildError: no compiler."""
    plan = build.recipe()
    compiler, flags = flags_of(plan)
    units = *(plan.sources / unit for unit in build.CUDA_KERNELS), HERE / "cuda_emulation.cpp"
    plan = plan._replace(
        objects={f"{unit.stem}.o": (compiler, str(unit), flags) for unit in units},
        information={**plan.information, "emulation": build.digest_of_sources(HERE)},
    )
    spec = importlib.util.spec_from_file_location("cuda_emulation", build.built(plan))
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class EmulatedKernels(CudaBackend):
    """The backend "cuda" on CPU tensors."""

    def __init__(self, module: types.ModuleType) -> None:
        self._compiled = module
        self.tickets = torch.frombuffer(module.tickets(), dtype=torch.int32)
        self.copies = 0  # calls that did not fit

    _reason = None

    def why_unsuitable(self, kind: Kind) -> str | None:
        return kind.why_not_fused()

    def _call(self, operation: str, device: torch.device, *arguments: object) -> bool:
        launches = self._compiled.counts()[0]
        launched: bool = getattr(self._compiled, operation)(*arguments)
        assert launched or self._compiled.counts()[0] == launches
        self.copies += not launched
        return launched

    def _workspace(self, tensor: Tensor, batch: int) -> Tensor:
        return super()._workspace(tensor, batch).fill_(0xFF)  # NaN, and tickets that are none


@contextlib.contextmanager
def registered(name: str, backend: registry.Backend) -> Iterator[None]:
    """The backend under this name, for a while."""
    former = registry.PLACES.get(name)
    registry.PLACES[name] = backend
    registry.backend_named.cache_clear()
    try:
        yield
    finally:
        if former is None:
            del registry.PLACES[name]
        else:
            registry.PLACES[name] = former
        registry.backend_named.cache_clear()
