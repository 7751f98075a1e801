"""What the suites compare: each loss as one writes it in PyTorch, compiled, and ours; and the bytes that each moves.

A *form* is a loss with its baseline; a *candidate* one way to get its value and gradients. Every candidate is a
function of two tensors and is checked against eager PyTorch in float64 before it is timed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels.calls import Kind
from fdu_kernels.registry import backend_named

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIGMA = 0.7
CLONE_PASSES = 2
"""Tensors of N elements that a copy moves: one read, one written."""
Outcome = tuple[Tensor, ...]
Call = Callable[[Tensor, Tensor], Outcome]


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, where the terms are computed."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def squared_hellinger(pred: Tensor, target: Tensor) -> Tensor:
    """1 - exp(-s/8), as one writes it in PyTorch."""
    s = (widened(pred) - widened(target)).square().flatten(1).mean(1) / SIGMA**2
    return -torch.expm1(s / -8).mean()


def jensen_shannon_bound(p: Tensor, q: Tensor) -> Tensor:
    """E_p[A] - E_q[B] of jensen_shannon: (log 2 - softplus(-v))/2 and (softplus(v) - log 2)/2."""
    return ((math.log(2) - F.softplus(-widened(p))) / 2).mean() - ((F.softplus(widened(q)) - math.log(2)) / 2).mean()


def kl_estimate(v: Tensor, _: Tensor) -> Tensor:
    """E_q[r log r] of the density ratio r = e^v."""
    v = widened(v)
    return (v.exp() * v).mean()


def by_autograd(loss: Callable[[Tensor, Tensor], Tensor], wanted: int) -> Call:
    """Value and gradients in the first ``wanted`` arguments, through autograd."""

    def run(a: Tensor, b: Tensor) -> Outcome:
        leaves = (a, b)[:wanted]
        value = loss(a, b)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


@dataclasses.dataclass(frozen=True)
class Form:
    """A loss of two tensors; ``backend`` is the last argument of what is ours."""

    eager: Callable[[Tensor, Tensor], Tensor]
    wanted: int
    """In how many of its arguments it is differentiated."""
    passes: int
    """Tensors of N elements that value and gradients have to move, if each is read or written once."""
    passes_of_long: int
    """The same where a sample's inputs exceed chip and cache, so that what needs its sum first is read twice."""
    loss: Callable[..., Tensor]
    value_and_grad: Callable[..., Outcome]


FORMS = {
    "gaussian": Form(
        squared_hellinger,
        1,
        3,
        5,
        lambda a, b, backend: fk.gaussian_divergence(a, b, "squared_hellinger", SIGMA, backend=backend),
        lambda a, b, backend: fk.gaussian_divergence_value_and_grad(a, b, "squared_hellinger", SIGMA, backend=backend),
    ),
    "mse": Form(
        lambda a, b: F.mse_loss(widened(a), widened(b)),
        1,
        3,
        5,
        lambda a, b, backend: fk.gaussian_divergence(a, b, "mse", backend=backend),
        lambda a, b, backend: fk.gaussian_divergence_value_and_grad(a, b, "mse", backend=backend),
    ),
    "variational": Form(
        jensen_shannon_bound,
        2,
        4,
        4,
        lambda a, b, backend: fk.variational_divergence(a, b, "jensen_shannon", backend=backend),
        lambda a, b, backend: fk.variational_divergence_value_and_grad(a, b, "jensen_shannon", backend=backend),
    ),
    "density_ratio": Form(
        kl_estimate,
        1,
        2,
        2,
        lambda a, b, backend: fk.density_ratio_divergence(a, "kl", backend=backend),
        lambda a, b, backend: fk.density_ratio_divergence_value_and_grad(a, "kl", backend=backend),
    ),
}


def candidate(form: str, which: str, backend: str, compiler: str = "inductor") -> Call:
    """What is timed: "eager", "compiled", "autograd" (ours) or "value_and_grad" (ours).

    Args:
        compiler: torch.compile's backend, for a rehearsal that has no time to compile.
    """
    of = FORMS[form]
    if which == "eager":
        return by_autograd(of.eager, of.wanted)
    if which == "compiled":
        torch._dynamo.reset()
        return by_autograd(torch.compile(of.eager, fullgraph=True, dynamic=False, backend=compiler), of.wanted)
    if which == "autograd":
        return by_autograd(lambda a, b: of.loss(a, b, backend), of.wanted)
    return lambda a, b: of.value_and_grad(a, b, backend)


def fused_backends(device: str | None = None) -> list[str]:
    """Those of ours that can run here, if a device is named on its tensors; the preferred first."""
    found = [name for name, reason in fk.backends().items() if reason is None and name != "torch"]
    if device is None:
        return found
    kind = Kind(torch.device(device), torch.float32, torch.float32, "exponential")
    return [name for name in found if backend_named(name).why_unsuitable(kind) is None]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two random tensors, requiring a gradient; small enough for e^v."""
    generator = torch.Generator(device).manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    return a.requires_grad_(), b.requires_grad_()


def check(run: Call, form: str, a: Tensor, b: Tensor) -> None:
    """Compare with eager PyTorch in float64.

    Raises:
        AssertionError: a value or gradient is wrong.
    """
    of = FORMS[form]
    wide = [tensor.detach().double().requires_grad_() for tensor in (a, b)]
    expected = by_autograd(of.eager, of.wanted)(*wide)
    tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
    for found, true in zip(run(a, b), expected, strict=True):
        spacing = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps  # of subnormal numbers
        atol = max(tolerance * true.abs().max().item(), spacing)
        torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=atol)
