"""The native backend: the kernels of csrc/, compiled C++, on the CPU.

Built with the distribution, or at first use where that was not possible (:mod:`fdu_kernels.build`).
"""

from __future__ import annotations

import functools
import types

import torch
from torch import Tensor

from fdu_kernels import build
from fdu_kernels.lowering import ElementFunction, GaussianProfile

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
# To be like one of these costs half of stating dtype and device, which torch.set_default_device would decide otherwise.
_NUMBER, _NUMBER64 = (torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64))


class NativeKernels:
    """The kernels for the CPU; see :class:`fdu_kernels.backends.kernels.Kernels`."""

    FUSES_FORWARD = True

    @functools.cached_property
    def _compiled(self) -> types.ModuleType:
        return build.load()

    @functools.cached_property
    def _reason(self) -> str | None:
        try:
            self._compiled  # noqa: B018
        except build.BuildError as error:
            return str(error)
        return None

    def why_unavailable(self) -> str | None:
        """Why there is no compiled module, and what mends it. The first call may build it."""
        return self._reason

    def why_unsuitable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot take tensors of this kind."""
        if device.type != "cpu":
            return f"it computes on the CPU, and the tensor is on {device}"
        return None if dtype in _DTYPES else f"it has no kernels for {dtype}"

    def gaussian_forward(
        self,
        pred: Tensor,
        target: Tensor,
        profile: GaussianProfile,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
    ) -> tuple[Tensor, Tensor]:
        """weight h(s) and 2 weight h'(s) / (sigma^2 Z)."""
        loss = _per_sample(pred)
        coefficient = torch.empty_like(loss)
        self._compiled.gaussian(
            _plain(pred), _plain(target), profile.c, profile.k, profile.linear_beyond, profile.table, sigma, weight,
            mask, distance == "mean", 0, 1.0, loss, coefficient, None,
        )  # fmt: skip
        return loss, coefficient

    def gaussian_backward(self, pred: Tensor, target: Tensor, mask: Tensor | None, coefficient: Tensor) -> Tensor:
        """coefficient_b mask (pred - target)."""
        grad = torch.empty_like(pred)
        self._compiled.gaussian_backward(_plain(pred), _plain(target), mask, coefficient, grad)
        return grad

    def gaussian_value_and_grad(
        self,
        pred: Tensor,
        target: Tensor,
        profile: GaussianProfile,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
        reduction: str,
        grad_scale: float | Tensor,
        grad_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The reduced loss, and the gradient of its sum times grad_scale."""
        value = _per_sample(pred) if reduction == "none" else _accumulated(pred)
        grad = torch.empty_like(pred) if grad_out is None else grad_out
        self._compiled.gaussian(
            _plain(pred), _plain(target), profile.c, profile.k, profile.linear_beyond, profile.table, sigma, weight,
            mask, distance == "mean", _REDUCTIONS[reduction], grad_scale, value, None, grad,
        )  # fmt: skip
        return value, grad

    def expectation(
        self, v: Tensor, function: ElementFunction, weight: Tensor | None, mask: Tensor | None, reduction: str
    ) -> Tensor:
        """y(v) times weight or mask, reduced."""
        value = _terms(v, reduction)
        self._compiled.expectation(
            _plain(v), function.numbers, weight, mask, _REDUCTIONS[reduction], 1.0, None, value, None
        )
        return value

    def expectation_backward(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        upstream: Tensor,
    ) -> Tensor:
        """The gradient of :meth:`expectation` in v."""
        grad = torch.empty_like(v)
        scale, elementwise = (1.0, upstream) if reduction == "none" else (upstream, None)
        self._compiled.expectation(
            _plain(v), function.numbers, weight, mask, _REDUCTIONS[reduction], scale, elementwise, None, grad
        )
        return grad

    def expectation_value_and_grad(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The value, and the gradient of its sum times grad_scale."""
        value, grad = _terms(v, reduction), torch.empty_like(v)
        self._compiled.expectation(
            _plain(v), function.numbers, weight, mask, _REDUCTIONS[reduction], grad_scale, None, value, grad
        )
        return value, grad


def _accumulated(tensor: Tensor) -> Tensor:
    return torch.empty_like(_NUMBER64 if tensor.dtype is torch.float64 else _NUMBER)


def _per_sample(tensor: Tensor) -> Tensor:
    return (_NUMBER64 if tensor.dtype is torch.float64 else _NUMBER).new_empty(tensor.shape[:1])


def _terms(v: Tensor, reduction: str) -> Tensor:
    if reduction != "none":
        return _accumulated(v)
    return torch.empty_like(v, dtype=torch.float64 if v.dtype is torch.float64 else torch.float32)


def _plain(tensor: Tensor) -> Tensor:
    # A pointer does not show the negative bit (of the imaginary part of a conjugate, for instance).
    return tensor.resolve_neg() if tensor.is_neg() else tensor


cpu = NativeKernels()
"""The backend "cpu"."""
