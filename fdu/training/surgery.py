"""Gradient surgery: remove the component of the erasing gradient that opposes preservation.

The projection of PCGrad (Yu et al. 2020, arXiv 2001.06782), applied only to the erasing gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

ROUNDING = 1e-4
"""Below this share of the erasing gradient, a preserving one is but rounding, as in the first step: frozen and trained
outputs are equal then, up to the order of sums in passes of different sizes."""


class GradientSurgery:
    """Keeps the gradients of erasing and of preserving apart, and joins them when both are complete.

    Each loss has its own forward and backward pass, over any number of batches; DDP averages each of them over the
    ranks. Loss scaling may stay on: with both losses scaled alike the result is scaled alike, and what is not finite in
    either gradient stays so for the GradScaler to find.

    Args:
        parameters: what is trained, whole in every process; the result is left in their ``.grad``.
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
    def combine(self, weight: float) -> Tensor:
        """Set every ``.grad`` to g_e - min(<g_e, g_p>, 0) / |g_p|^2 g_p + weight g_p, and forget g_p.

        Without the projection where g_p is next to nothing (``ROUNDING``).

        g_e is the gradient in ``.grad``, g_p that of preservation, <.,.> the dot product over all parameters together.
        The host never waits.

        Returns:
            The cosine of g_e and g_p, float32 []; 0 where one of them vanishes. Below 0 they were in conflict.
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
            return torch.zeros(())
        dot, erasing_square, preserving_square = _dot_products(erasing, preserving)
        # NaN compares false: it stays where it is in the gradients.
        tells = preserving_square > ROUNDING**2 * erasing_square
        conflict = torch.where((dot < 0) & tells, dot / preserving_square, 0.0)
        torch._foreach_mul_(preserving, weight - conflict)
        torch._foreach_add_(erasing, preserving)
        lengths = torch.sqrt(erasing_square) * torch.sqrt(preserving_square)
        return torch.where(lengths > 0, dot / lengths, 0.0)

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
