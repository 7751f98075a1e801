"""The backend "torch": eager PyTorch on any device and in any dtype. Every other backend is tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from fdu_kernels import formulas
from fdu_kernels.calls import ExpectationCall, GaussianCall, Kind

FUSES_FORWARD = False


def why_unavailable() -> None:
    """It runs wherever PyTorch does."""


def why_unsuitable(kind: Kind) -> None:
    """It takes every call."""


@torch.no_grad()
def gaussian_forward(call: GaussianCall) -> tuple[Tensor, Tensor]:
    """See :class:`fdu_kernels.registry.Backend`."""
    return formulas.gaussian_terms(call)[:2]


@torch.no_grad()
def gaussian_backward(call: GaussianCall, coefficient: Tensor) -> Tensor:
    """See :class:`fdu_kernels.registry.Backend`."""
    _, masked, _ = formulas.distance_terms(call)
    return _like(call.pred, formulas.per_sample(coefficient, masked) * masked)


@torch.no_grad()
def gaussian_value_and_grad(call: GaussianCall, grad_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """See :class:`fdu_kernels.registry.Backend`."""
    value, grad = formulas.gaussian_value_and_grad(call)
    return value, _like(call.pred, grad, grad_out)


@torch.no_grad()
def expectation_forward(call: ExpectationCall) -> Tensor:
    """See :class:`fdu_kernels.registry.Backend`."""
    return formulas.expectation(call)


@torch.no_grad()
def expectation_backward(call: ExpectationCall, upstream: Tensor) -> Tensor:
    """See :class:`fdu_kernels.registry.Backend`."""
    return _like(call.v, formulas.expectation_grad(call, upstream))


@torch.no_grad()
def expectation_value_and_grad(call: ExpectationCall) -> tuple[Tensor, Tensor]:
    """See :class:`fdu_kernels.registry.Backend`."""
    value, grad = formulas.expectation_value_and_grad(call)
    return value, _like(call.v, grad)


def _like(tensor: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient in the dtype and layout of its input."""
    return (torch.empty_like(tensor) if out is None else out).copy_(grad)
