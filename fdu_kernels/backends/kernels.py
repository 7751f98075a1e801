"""What a fused backend has: a few kernels over numbers, which :mod:`fdu_kernels.ops` puts autograd around.

Sums are accumulated in float32 or better (float64 for float64) in a fixed order: a result is the same to the last bit
on every run. On the CPU the order depends on shapes, strides and instruction set, and not on the number of threads; on
a GPU on shapes, strides, alignment and the device (its multiprocessors, and whether it has clusters). Nothing here
makes the host wait.
Arguments arrive checked (fdu_kernels.checks); pred and target may have two dtypes. "acc" is float32, or float64 if an
input is float64.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fdu_kernels.lowering import ElementFunction, GaussianProfile


class Kernels(Protocol):
    """The functions of a backend module."""

    FUSES_FORWARD: bool
    """Whether the forward of autograd should compute the gradient as well. It pays where reading the upstream gradient
    costs nothing (the CPU): the usual 1.0 then needs no second pass."""

    def why_unavailable(self) -> str | None:
        """Why it cannot run on this machine, or None. Cheap: the answer is asked for at every call."""

    def why_unsuitable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot take tensors of this kind, or None."""

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
        """weight h(s) [B] and 2 weight h'(s) / (sigma^2 Z) [B], both acc. Reads pred and target once."""

    def gaussian_backward(self, pred: Tensor, target: Tensor, mask: Tensor | None, coefficient: Tensor) -> Tensor:
        """coefficient_b mask (pred - target), rounded once to the dtype of pred; coefficient [B] acc."""

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
        """The reduced loss ([B] for "none", else []; acc) and the gradient of its sum, times grad_scale."""

    def expectation(
        self, v: Tensor, function: ElementFunction, weight: Tensor | None, mask: Tensor | None, reduction: str
    ) -> Tensor:
        """y(v) times weight [B] or mask (broadcastable), not both; acc. A mean divides by the number of elements, or
        by the sum of the mask over all elements (0 gives 0)."""

    def expectation_backward(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        upstream: Tensor,
    ) -> Tensor:
        """The gradient in v: upstream is [] acc, or of the shape of v for reduction "none"."""

    def expectation_value_and_grad(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The value, and the gradient of its sum times grad_scale, in one pass."""
