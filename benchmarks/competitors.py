"""What the benchmarks compare: each loss in plain PyTorch, the same compiled, ours, and your own.

A *form* is a loss. :func:`loss` makes a form from PyTorch code. This code is the reference of the form and its
competitors "eager" and "compiled". :func:`competitor` enters another implementation. Every competitor takes the form's
two tensors. A benchmark checks it against the reference in float64 before it times it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

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
EAGER, COMPILED, AUTOGRAD, FUSED = "eager", "compiled", "autograd", "value_and_grad"
Outcome = tuple[Tensor, ...]
Loss = Callable[[Tensor, Tensor], Tensor]
Call = Callable[[Tensor, Tensor], Outcome]
Pair = tuple[Tensor, Tensor]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Form:
    """A loss of two tensors."""

    reference: Loss
    wanted: int
    """The number of arguments, counted from the first, that need a gradient."""
    passes: int
    """The number of tensors that value and gradients read or write, each once."""
    ours: tuple[Any, ...] = ()
    """Our function in fdu_kernels and its arguments after the tensors."""
    tensors: int = 2
    """Tensors that our function takes."""
    others: dict[str, Call] = dataclasses.field(default_factory=dict)
    """Entered by :func:`competitor`."""


FORMS: dict[str, Form] = {}


def loss(wanted: int, passes: int, **ours: Any) -> Callable[[Loss], Loss]:
    """Make a form, named after the decorated function; the arguments are :class:`Form`'s."""

    def enter(reference: Loss) -> Loss:
        FORMS[reference.__name__] = Form(reference, wanted, passes, **ours)
        return reference

    return enter


def competitor(form: str, gradients: bool = False) -> Callable[[Callable], Callable]:
    """Enter the decorated function, under its own name, into the benchmarks of a form.

    Args:
        gradients: the function returns (value, gradients...). By default it returns the loss, for autograd.
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is unknown; choose one of {', '.join(FORMS)}, or make it with @loss")

    def enter(function: Callable) -> Callable:
        FORMS[form].others[function.__name__] = function if gradients else by_autograd(function, FORMS[form].wanted)
        return function

    return enter


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, in which the terms are computed."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


@loss(wanted=1, passes=3, ours=("gaussian_divergence", "squared_hellinger", SIGMA))
def gaussian(pred: Tensor, target: Tensor) -> Tensor:
    """Squared Hellinger, the recommended loss: 1 - exp(-s/8)."""
    s = (widened(pred) - widened(target)).square().flatten(1).mean(1) / SIGMA**2
    return -torch.expm1(s / -8).mean()


@loss(wanted=1, passes=3, ours=("gaussian_divergence", "mse"))
def mse(pred: Tensor, target: Tensor) -> Tensor:
    """The profile h(s) = s, whose baseline is F.mse_loss itself."""
    return F.mse_loss(widened(pred), widened(target))


@loss(wanted=2, passes=4, ours=("variational_divergence", "jensen_shannon"))
def variational(p: Tensor, q: Tensor) -> Tensor:
    """E_p[A] - E_q[B] of jensen_shannon: (log 2 - softplus(-v))/2 and (softplus(v) - log 2)/2."""
    return ((math.log(2) - F.softplus(-widened(p))) / 2).mean() - ((F.softplus(widened(q)) - math.log(2)) / 2).mean()


@loss(wanted=1, passes=2, ours=("density_ratio_divergence", "kl"), tensors=1)
def density_ratio(v: Tensor, _: Tensor) -> Tensor:
    """E_q[r log r] of the density ratio r = e^v; the second tensor is not used."""
    v = widened(v)
    return (v.exp() * v).mean()


def by_autograd(loss: Loss, wanted: int) -> Call:
    """Value and gradients in the first ``wanted`` arguments, through autograd."""

    def run(a: Tensor, b: Tensor) -> Outcome:
        leaves = (a, b)[:wanted]
        value = loss(a, b)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return run


def candidate(form: str, which: str, backend: str = "", compiler: str = "inductor") -> Call:
    """A competitor: "eager", "compiled", "autograd" or "value_and_grad" (ours on a backend), or one that was entered.

    Args:
        compiler: torch.compile's backend; a rehearsal has no time to compile.
    """
    of = FORMS[form]
    if which in of.others:
        return of.others[which]
    if which == EAGER:
        return by_autograd(of.reference, of.wanted)
    if which == COMPILED:
        torch._dynamo.reset()
        return by_autograd(torch.compile(of.reference, fullgraph=True, dynamic=False, backend=compiler), of.wanted)
    name, *others = of.ours
    function = getattr(fk, name if which == AUTOGRAD else f"{name}_{which}")

    def ours(a: Tensor, b: Tensor) -> Any:
        return function(a, *others, backend=backend) if of.tensors == 1 else function(a, b, *others, backend=backend)

    return by_autograd(ours, of.wanted) if which == AUTOGRAD else ours


def competitors_of(
    form: str,
    backends: list[str],
    ours: tuple[str, ...] = (AUTOGRAD, FUSED),
    baselines: tuple[str, ...] = (EAGER, COMPILED),
    compiler: str = "inductor",
) -> dict[str, Call]:
    """A form's competitors by name: baselines, those that were entered, and ours as "BACKEND WHICH"."""
    others = FORMS[form].others if baselines else ()
    found = {which: candidate(form, which, compiler=compiler) for which in (*baselines, *others)}
    if FORMS[form].ours:
        found.update({f"{name} {which}": candidate(form, which, name) for name in backends for which in ours})
    return found


def fused_backends(device: str | None = None) -> list[str]:
    """Our backends that can run here, or on the tensors of a device; the preferred one comes first."""
    found = [name for name, reason in fk.backends().items() if reason is None and name != "torch"]
    if device is None:
        return found
    kind = Kind(torch.device(device), torch.float32, torch.float32, "exponential")
    return [name for name in found if backend_named(name).why_unsuitable(kind) is None]


def inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0, wanted: int = 2) -> Pair:
    """Two random tensors, small enough for e^v; the first ``wanted`` require a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2))
    return a.requires_grad_(wanted > 0), b.requires_grad_(wanted > 1)


def rotating(form: str, shape: Shape, dtype: torch.dtype, device: str, size: int, most: int = 64) -> list[Pair]:
    """Two to ``most`` pairs of random inputs, enough to fill ``size`` bytes."""
    count = max(2, min(most, -(-size // (2 * math.prod(shape) * dtype.itemsize))))
    return [inputs(shape, dtype, device, seed, FORMS[form].wanted) for seed in range(count)]


def check(run: Call, form: str, a: Tensor, b: Tensor) -> None:
    """Compare with eager PyTorch in float64.

    Raises:
        AssertionError: a value or gradient is wrong.
    """
    of = FORMS[form]
    wide = [tensor.detach().double().requires_grad_() for tensor in (a, b)]
    expected = by_autograd(of.reference, of.wanted)(*wide)
    tolerance = 1e-4 if a.dtype == torch.float32 else 2e-2
    for found, true in zip(run(a, b), expected, strict=True):
        spacing = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps  # of subnormal numbers
        atol = max(tolerance * true.abs().max().item(), spacing)
        torch.testing.assert_close(found.double(), true, rtol=tolerance, atol=atol)
