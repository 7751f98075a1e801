"""The backend "torch": eager PyTorch on any device and in any dtype. Every other backend is tested against it.

What its functions compute: :class:`fdu_kernels.registry.Backend`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdu_kernels import formulas
from fdu_kernels.calls import ExpectationCall, GaussianCall, Kind


class TorchBackend:
    """Eager PyTorch."""

    FUSES_FORWARD = False

    def why_unavailable(self) -> None:
        """It runs wherever PyTorch does."""

    def why_unsuitable(self, kind: Kind) -> None:
        """It takes every call."""

    @torch.no_grad()
    def gaussian_forward(self, call: GaussianCall) -> tuple[Tensor, Tensor]:
        return formulas.gaussian_terms(call)[:2]

    @torch.no_grad()
    def gaussian_backward(self, call: GaussianCall, coefficient: Tensor) -> Tensor:
        _, masked, _ = formulas.distance_terms(call)
        return _like(call.pred, formulas.per_sample(coefficient, masked) * masked)

    @torch.no_grad()
    def gaussian_value_and_grad(self, call: GaussianCall, grad_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, grad = formulas.gaussian_value_and_grad(call)
        return value, _like(call.pred, grad, grad_out)

    @torch.no_grad()
    def expectation_forward(self, call: ExpectationCall) -> Tensor:
        return formulas.expectation(call)

    @torch.no_grad()
    def expectation_backward(self, call: ExpectationCall, upstream: Tensor) -> Tensor:
        return _like(call.v, formulas.expectation_grad(call, upstream))

    @torch.no_grad()
    def expectation_value_and_grad(self, call: ExpectationCall) -> tuple[Tensor, Tensor]:
        value, grad = formulas.expectation_value_and_grad(call)
        return value, _like(call.v, grad)


def _like(tensor: Tensor, grad: Tensor, out: Tensor | None = None) -> Tensor:
    """The gradient in the dtype and layout of its input."""
    return (torch.empty_like(tensor) if out is None else out).copy_(grad)


torch_backend = TorchBackend()
"""The backend "torch"."""
