"""Gradient surgery: remove the component of the erasing gradient that opposes preservation.

The projection of PCGrad (Yu et al. 2020, arXiv 2001.06782), applied only to the erasing gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROUNDING = 1e-4
"""A preserving gradient below this share of the erasing one is rounding, as in the first step, in which frozen and
trained outputs differ only by the order of sums."""


class GradientSurgery:
    """Keeps the gradients of erasing and of preserving apart, and combines them when both are complete.

    Each loss has its own forward and backward pass, over any number of batches; DDP averages both over the processes.
    Loss scaling may stay on: the result scales with the losses, and infinities stay for the GradScaler to find.

    Args:
        parameters: the trained parameters, whole in every process; the result is in their ``.grad``.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._preserving: list[Tensor | None] = [None] * len(self.parameters)

    @contextmanager
    def preserving(self) -> Iterator[None]:
        """Within this context ``.grad`` is the gradient of preservation; that of erasing waits outside."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def combine(self, weight: float) -> None:
        """Set every ``.grad`` to g_e - min(<g_e, g_p>, 0) / |g_p|^2 g_p + weight g_p, and forget g_p.

        g_e is the gradient in ``.grad``, g_p that of preservation, <.,.> the dot product over all parameters. A g_p
        below ``ROUNDING`` is not projected. The host never waits.
        """
        erasing, preserving = [], []
        for parameter, gradient in zip(self.parameters, self._preserving, strict=True):
            if gradient is not None:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(gradient)
                erasing.append(parameter.grad)
                preserving.append(gradient)
        self._preserving = [None] * len(self.parameters)
        if not preserving:
            return
        dot, erasing_square, preserving_square = _dot_products(erasing, preserving)
        # NaN compares false: it stays where it is in the gradients.
        tells = preserving_square > ROUNDING**2 * erasing_square
        conflict = torch.where((dot < 0) & tells, dot / preserving_square, 0.0)
        torch._foreach_mul_(preserving, weight - conflict)
        torch._foreach_add_(erasing, preserving)

    def _exchange(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.grad, self._preserving[index] = self._preserving[index], parameter.grad


def _dot_products(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """<one, other>, |one|^2 and |other|^2 over all tensors together, float32 [3]."""
    columns = [
        torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True)]).float(),
        torch.stack(torch._foreach_norm(one)).float().square(),
        torch.stack(torch._foreach_norm(other)).float().square(),
    ]
    return torch.stack(columns).sum(1)
