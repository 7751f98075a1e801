"""DTensors: each device computes its part of the samples or elements, and sums are joined.

A Gaussian loss keeps samples whole: a pred that is sharded over another dimension than the batch is gathered first. A
density ratio may be sharded in any way. Results are DTensors; a reduced one is a partial sum until somebody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fdu_kernels import formulas
from fdu_kernels.calls import ExpectationCall, GaussianCall

Compute = Callable[[Any], Any]
"""Computes with the call on this device's plain tensors."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, which costs a second to import."""
    return type(tensor).__name__ == "DTensor"


def gaussian(call: GaussianCall, compute: Compute) -> Tensor:
    """The loss."""
    parts = _Parts(call.pred, (0,))
    local = _local_gaussian(call, parts)
    value = compute(local) if len(local.pred) else formulas.gaussian(local)
    _note(call, local, parts)
    return parts.value(value, call.reduction, call.pred.shape[:1], call.divisor)


def gaussian_value_and_grad(call: GaussianCall, compute: Compute) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    parts = _Parts(call.pred.detach(), (0,))
    local = _local_gaussian(call, parts)
    local.grad_scale = parts.of(call.grad_scale, ()) / call.divisor
    value, grad = compute(local) if len(local.pred) else (formulas.gaussian(local), torch.empty_like(local.pred))
    grad = parts.joined(grad, parts.placements, call.pred.shape)
    _note(call, local, parts)
    return parts.value(value, call.reduction, call.pred.shape[:1], call.divisor), grad


def expectation(call: ExpectationCall, compute: Compute) -> Tensor:
    """The value."""
    parts = _Parts(call.v, range(call.v.ndim))
    local, divisor = _local_expectation(call, parts)
    return parts.value(compute(local), call.reduction, call.v.shape, divisor)


def expectation_value_and_grad(call: ExpectationCall, compute: Compute) -> tuple[Tensor, Tensor]:
    """The value and its gradient."""
    parts = _Parts(call.v.detach(), range(call.v.ndim))
    local, divisor = _local_expectation(call, parts)
    local.grad_scale = parts.of(call.grad_scale, ()) / divisor
    value, grad = compute(local)
    return parts.value(value, call.reduction, call.v.shape, divisor), parts.joined(grad, parts.placements, call.v.shape)


def _note(call: GaussianCall, local: GaussianCall, parts: _Parts) -> None:
    if local.s is not None:
        call.s = parts.joined(local.s, parts.placements, call.pred.shape[:1])


def _local_gaussian(call: GaussianCall, parts: _Parts) -> GaussianCall:
    target, sigma = parts.of(call.target, call.pred.shape), parts.of(call.sigma, call.pred.shape[:1])
    weight, mask = parts.of(call.weight, call.pred.shape[:1]), parts.of(call.mask, call.pred.shape)
    reduction = "none" if call.reduction == "none" else "sum"
    wants_s = call.return_distance
    return GaussianCall(
        parts.local, target, call.profile, sigma, weight, mask, call.distance, reduction, return_distance=wants_s
    )


def _local_expectation(call: ExpectationCall, parts: _Parts) -> tuple[ExpectationCall, float | Tensor]:
    """The call of this device, without the mean's divisor; and that."""
    weight, mask = parts.of(call.weight, call.v.shape[:1]), parts.of(call.mask, call.v.shape)
    divisor: float | Tensor = float(call.v.numel()) if call.reduction == "mean" else 1.0
    if call.reduction == "mean" and mask is not None:
        own = mask.detach().to(call.accumulation).expand(parts.local.shape).sum()
        total: Tensor = parts.joined(own, parts.partial, ()).full_tensor()
        divisor = torch.where(total == 0, torch.ones_like(total), total)
    reduction = "none" if call.reduction == "none" else "sum"
    return ExpectationCall(parts.local, call.function, weight, mask, reduction), divisor


class _Parts:
    """How a DTensor lies on its devices, sharded over no other dimensions than those given."""

    def __init__(self, tensor: Any, dims: Sequence[int]) -> None:
        from torch.distributed.tensor import Partial, Replicate

        self.mesh = tensor.device_mesh
        self.placements: list[Any] = [
            placement if any(placement.is_shard(dim) for dim in dims) else Replicate()
            for placement in tensor.placements
        ]
        self.partial = [Partial() if placement.is_shard() else placement for placement in self.placements]
        self.local: Tensor = tensor.redistribute(self.mesh, self.placements).to_local()

    def of(self, given: Any, shape: Sequence[int]) -> Any:
        """This device's part of what broadcasts to ``shape``: a tensor that is distributed or the same everywhere."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not isinstance(given, Tensor):
            return given
        missing = len(shape) - given.ndim
        dims = [placement.dim - missing if placement.is_shard() else -1 for placement in self.placements]
        placements = [Shard(dim) if 0 <= dim < given.ndim and given.shape[dim] > 1 else Replicate() for dim in dims]
        given = given.detach()
        if not isinstance(given, DTensor):
            given = DTensor.from_local(given, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return given.redistribute(self.mesh, placements).to_local()

    def joined(self, local: Tensor, placements: Sequence[Any], shape: Sequence[int]) -> Any:
        """The DTensor of that shape whose part this is."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size(shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def value(self, local: Tensor, reduction: str, shape: Sequence[int], divisor: float | Tensor) -> Any:
        """All terms, of that shape, or what is reduced of them."""
        if reduction == "none":
            return self.joined(local, self.placements, shape)
        return self.joined(local / divisor, self.partial, ())
