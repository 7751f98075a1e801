"""What the tests of kernels share: error bounds against float64, memory layouts, and pairs of parameters.

The bounds are the rules of docs/losses.md, "Accuracy".
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels.critic import DERIVATIVE, FIRST, CriticRow, ElementFunction
from fdu_kernels.scalar import MAX_EXPONENT

# Triton's interpreter cuts bfloat16 off instead of rounding it.
ROUNDING = 1.0 if os.environ.get("TRITON_INTERPRET") == "1" else 0.5


def pair(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two tensors of normal numbers, the same ones for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return pred, target


def doubled(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def condition(divergence: fk.Divergence, s: Tensor) -> Tensor:
    """By what h and h' multiply a relative error of s, at least 1: |k| s, or as the table's slopes say."""
    if divergence.exponential is not None:
        # At an infinite s it is that of the straight line's beginning.
        return (abs(divergence.exponential[1]) * s).clamp(min=1).nan_to_num(nan=1.0, posinf=MAX_EXPONENT)
    step = 1e-4
    ends = s * (1 - step), s * (1 + step)
    growths = [[torch.log(function(end)) for end in ends] for function in (divergence.profile, divergence.profile_grad)]
    powers = torch.stack([(far - near).abs() / (2 * step) for near, far in growths])
    return powers.nan_to_num(nan=1.0, posinf=1.0).amax(0).clamp(min=1)


def unit(dtype: torch.dtype) -> float:
    """The relative error of a value of that accumulation dtype whose condition is 1."""
    return 1e-12 if dtype == torch.float64 else 2e-6


def assert_within(actual: Tensor, truth: Tensor, bound: Tensor, excuse: Tensor | None = None) -> None:
    """NaN and infinities are those of the truth, anything else lies within the bound; or it equals the excuse."""
    assert actual.shape == truth.shape
    bound = bound.nan_to_num(nan=0.0, posinf=0.0)
    rounded = truth.to(actual.dtype)
    wide = actual.double()
    good = (actual == rounded) | (actual.isnan() & truth.isnan()) | ((wide - truth).abs() <= bound)
    # Just short of the largest number either side is right.
    largest = torch.finfo(actual.dtype).max
    good |= actual.isinf() & (actual.sign() == truth.sign()) & (truth.abs() + bound >= largest)
    if excuse is not None:
        good |= (actual == excuse) | (actual.isnan() & excuse.isnan())
    if not bool(good.all()):
        worst = [tensor.double().expand(good.shape)[~good][:5].tolist() for tensor in (actual, truth, bound)]
        raise AssertionError(
            f"{int((~good).sum())} of {good.numel()}: actual {worst[0]} truth {worst[1]} +- {worst[2]}"
        )


def check_gaussian(
    backend: str,
    pred: Tensor,
    target: Tensor,
    name: str | fk.Divergence = "squared_hellinger",
    *,
    grad_scale: float | Tensor = 1.0,
    grad_out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Value and gradient of every way to call the loss, each against float64; returns those of value_and_grad.

    The target may have another dtype than pred.
    """
    divergence = fk.get_divergence(name)
    reduction = options.pop("reduction", "mean")
    wide = {key: doubled(value) for key, value in options.items()}
    pair = pred.detach().double(), target.detach().double()
    losses, _ = fk.gaussian_divergence_value_and_grad(*pair, divergence, **wide, reduction="none", backend="torch")
    truth = fk.gaussian_divergence_value_and_grad(
        *pair, divergence, **wide, reduction=reduction, grad_scale=doubled(grad_scale), backend="torch"
    )
    accumulation = torch.float64 if torch.float64 in (pred.dtype, target.dtype) else torch.float32
    distance = {key: value for key, value in wide.items() if key in ("sigma", "mask", "distance")}
    true_s = fk.squared_distance(*pair, **distance)
    condition_of_s = condition(divergence, true_s)
    # Squares below the smallest number are lost, those above the largest infinite.
    limits = torch.finfo(accumulation)
    sums = fk.squared_distance(*pair, mask=options.get("mask"), distance="sum")
    elements = max(pred[0].numel(), 1)
    lost = 2 * elements * limits.smallest_normal * limits.eps / sums
    of_s = unit(accumulation) + lost
    relative = condition_of_s * of_s
    overflows = (fk.squared_distance(*pair, distance="sum") > limits.max / 4) & sums.isfinite()
    flushed = limits.smallest_normal

    per_sample = (losses.abs() * relative).nan_to_num(nan=0.0, posinf=0.0) + flushed
    bounds = {"none": per_sample, "sum": per_sample.sum(), "mean": per_sample.mean()}
    difference = (pair[0] - pair[1]).abs().nan_to_num(posinf=0.0, nan=0.0)
    grad_bound = truth[1].abs() * relative.reshape(-1, *[1] * (pred.ndim - 1))
    grad_bound = grad_bound + flushed * (1 + difference) * max(1.0, abs(float(grad_scale)))
    if pred.dtype != accumulation:
        narrow = torch.finfo(pred.dtype)
        grad_bound = grad_bound + (truth[1].abs() * narrow.eps * ROUNDING).clamp(
            min=narrow.smallest_normal * narrow.eps * ROUNDING
        )
    excuses: tuple[Tensor | None, Tensor | None] = None, None
    excuse_of_s: Tensor | None = None
    if bool(overflows.any()):
        eager = fk.gaussian_divergence_value_and_grad(
            pred.detach(), target.detach(), divergence, **options, reduction=reduction, grad_scale=grad_scale,
            backend="torch",
        )  # fmt: skip
        excuses = eager[0], eager[1].where(overflows.reshape(-1, *[1] * (pred.ndim - 1)), truth[1].to(pred.dtype))

        eager_s = fk.squared_distance(pred.detach(), target.detach(), **{name: options[name] for name in distance})
        excuse_of_s = eager_s.double().where(overflows, true_s)

    def check(value: Tensor, grad: Tensor | None, s: Tensor | None = None) -> None:
        assert value.dtype == accumulation
        if s is not None:
            assert s.dtype == torch.float64 and s.is_contiguous() and not s.requires_grad
            assert_within(s, true_s, true_s * of_s + flushed, excuse_of_s)
        assert_within(value, truth[0], bounds[reduction], excuses[0])
        if grad is not None:
            assert grad.dtype == pred.dtype
            assert_within(grad, truth[1], grad_bound, excuses[1])

    arguments = {**options, "reduction": reduction, "backend": backend}
    *found, s = fk.gaussian_divergence_value_and_grad(
        pred, target, divergence, **arguments, grad_scale=grad_scale, grad_out=grad_out, return_distance=True
    )
    check(*found, s)
    assert grad_out is None or found[1] is grad_out
    alone, s = fk.gaussian_divergence(pred.detach(), target, divergence, **arguments, return_distance=True)
    check(alone, None, s)
    leaf = pred.detach().requires_grad_()
    value = fk.gaussian_divergence(leaf, target, divergence, **arguments)
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, float(grad_scale)))
    check(value.detach(), grad)
    return found[0], found[1]


def size_of_terms(row: CriticRow, v: Tensor, tilt: float, slope: bool) -> Tensor:
    """The sum of the absolute values of a row's terms, or of its derivative's."""
    total = torch.zeros_like(v)
    logistic = ("softplus", "sigmoid", "tanh", "tanh_squared")
    for name in ("const", "linear", "square", "exp", "expm1", *logistic, "step"):
        others = {"exp_rate": row.exp_rate, "expm1_rate": row.expm1_rate, "scale": row.scale, "logit": row.logit}
        one = CriticRow(**{name: getattr(row, name)}, **others, threshold=row.threshold)
        total += (one.slope(v) if slope else one.value(v, tilt)).abs()
    if row.softplus and not slope:
        # Itself a sum, x + log(...), where mix e^x is more than 1 - mix; its parts cancel where mix is small.
        x = row.scale * v
        above = x + row.logit > 0
        total += abs(row.softplus) * torch.where(above, x.abs(), 0.0) * torch.exp(tilt * v)
    return total


def sizes_of_terms(function: ElementFunction, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the value and of the slope of a function, in float64; 0 for a NaN."""
    v = v.double().nan_to_num().clamp(-function.limit, function.limit)
    first = size_of_terms(function.first, v, function.first_tilt, False)
    second = size_of_terms(function.second, v, function.second_tilt, False)
    if function.slope == DERIVATIVE:
        return first, size_of_terms(function.first, v, 0.0, True)
    return first + second, first if function.slope == FIRST else second


def element_bounds(function: ElementFunction, v: Tensor) -> tuple[Tensor, Tensor]:
    """What y(v) and its slope may err by: some roundings of each term, and of the exponents."""
    sizes = sizes_of_terms(function, v)
    rate = max(function.first.rate, function.second.rate) + max(abs(function.first_tilt), abs(function.second_tilt))
    inside = v.double().nan_to_num().clamp(-function.limit, function.limit)
    relative = unit(v.dtype) / 2 * (rate * inside.abs() / 4).clamp(min=1)
    beyond = (v.double() - inside).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs()
    flushed = torch.finfo(torch.float64 if v.dtype == torch.float64 else torch.float32).smallest_normal
    return relative * (sizes[0] + sizes[1] * beyond) + flushed, relative * sizes[1] + flushed


def _reduced(bound: Tensor, factor: Tensor | None, reduction: str, *, masked: bool) -> tuple[Tensor, Tensor]:
    """The bound of a value, and what multiplies that of the gradient."""
    factor = torch.ones_like(bound) if factor is None else factor.detach().double().expand(bound.shape)
    if reduction == "none":
        return factor * bound, factor
    divisor = 1.0
    if reduction == "mean":
        divisor = (float(factor.sum()) if masked else bound.numel()) or 1.0
    return (factor * bound).sum() / divisor, factor / divisor


def _grad_bound(bound: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    bound = bound + truth.abs() * 1e-6 * (dtype != torch.float64)
    if dtype in (torch.float16, torch.bfloat16):
        narrow = torch.finfo(dtype)
        bound = bound + (truth.abs() * narrow.eps * ROUNDING).clamp(min=narrow.smallest_normal * narrow.eps * ROUNDING)
    return bound + torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).smallest_normal


def check_density_ratio(
    backend: str,
    v: Tensor,
    name: str,
    samples_from: str = "q",
    weight: Tensor | None = None,
    reduction: str = "mean",
    grad_scale: float = 1.0,
) -> None:
    """Value and gradient of every way to call the estimate, each against float64."""
    arguments = (name, samples_from)
    function = fk.get_divergence(name).ratio_function(samples_from)
    assert isinstance(function, ElementFunction)
    truth = fk.density_ratio_divergence_value_and_grad(
        v.detach().double(), *arguments, doubled(weight), reduction, "torch", grad_scale
    )
    value_bound, slope_bound = element_bounds(function, v)
    factor = None if weight is None else weight.reshape(-1, *[1] * (v.ndim - 1))
    value_bound, factor = _reduced(value_bound, factor, reduction, masked=False)
    grad_bound = _grad_bound(slope_bound * factor * abs(grad_scale), truth[1], v.dtype)

    found = fk.density_ratio_divergence_value_and_grad(v, *arguments, weight, reduction, backend, grad_scale)
    leaf = v.detach().requires_grad_()
    value = fk.density_ratio_divergence(leaf, *arguments, weight, reduction, backend)
    (grad,) = torch.autograd.grad(value, leaf, torch.full_like(value, grad_scale))
    alone = fk.density_ratio_divergence(v.detach(), *arguments, weight, reduction, backend)
    for one in (found[0], value.detach(), alone):
        assert_within(one, truth[0], value_bound)
    for one in (found[1], grad):
        assert one.dtype == v.dtype
        assert_within(one, truth[1], grad_bound)


def check_variational(
    backend: str,
    p: Tensor,
    q: Tensor,
    name: str,
    mask: Tensor | None = None,
    parametrization: str = "log_ratio",
    reduction: str = "mean",
    grad_scale: float = 1.0,
) -> None:
    """Value and gradients of every way to call the bound and the model's term, each against float64."""
    functions = fk.get_divergence(name).critic_functions(parametrization)
    arguments = (name, mask, parametrization, reduction)
    wide = name, doubled(mask), parametrization, reduction
    truth = fk.variational_divergence_value_and_grad(
        p.detach().double(), q.detach().double(), *wide, "torch", grad_scale
    )
    model_truth = fk.variational_model_loss(q.detach().double(), *wide, "torch")
    value_bounds, grad_bounds = [], []
    for function, v, exact in zip(functions, (p, q), truth[1:], strict=True):
        value_bound, slope_bound = element_bounds(function, v)
        value_bound, factor = _reduced(value_bound, mask, reduction, masked=mask is not None)
        value_bounds.append(value_bound)
        grad_bounds.append(_grad_bound(slope_bound * factor * abs(grad_scale), exact, v.dtype))

    found = fk.variational_divergence_value_and_grad(p, q, *arguments, backend, grad_scale)
    leaves = [v.detach().requires_grad_() for v in (p, q)]
    value = fk.variational_divergence(*leaves, *arguments, backend)
    grads = torch.autograd.grad(value, leaves, torch.full_like(value, grad_scale))
    model = fk.variational_model_loss(leaves[1], *arguments, backend)
    (model_grad,) = torch.autograd.grad(model, leaves[1], torch.full_like(model, grad_scale))
    for one in (found[0], value.detach()):
        assert_within(one, truth[0], sum(value_bounds))
    assert_within(model.detach(), model_truth, value_bounds[1])
    for one, exact, bound in (
        *zip((*found[1:], *grads), truth[1:] * 2, grad_bounds * 2, strict=True),
        (model_grad, truth[2], grad_bounds[1]),
    ):
        assert_within(one, exact, bound)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values as "dense", "permuted" (the dimensions in reverse), "sliced" (every second element in each
    dimension, from the second on) or "offset" (not aligned) in memory."""
    shape = tensor.shape
    if layout == "permuted":
        backwards = tuple(reversed(range(len(shape))))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if layout == "sliced":
        around = tensor.new_full([2 * size + 1 for size in shape], 0)
        return around[tuple(slice(1, None, 2) for _ in shape)].copy_(tensor)
    if layout == "offset":
        return tensor.new_full((tensor.numel() + 1,), 0)[1:].view(shape).copy_(tensor)
    return tensor.contiguous()


def pairs(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Combinations of one value of each axis in which any two values of different axes occur together.

    Equal axes give equal combinations, in the order of the product. Two axes give the whole product.
    """
    places = list(itertools.combinations(range(len(axes)), 2))
    indices = list(itertools.product(*(range(len(axis)) for axis in axes)))
    open_pairs = {(a, b, one[a], one[b]) for one in indices for a, b in places}
    # Among equals max takes the first: in this order it has other values on every axis.
    order = sorted(indices, key=lambda one: (sum(one) % max(map(len, axes)), one))
    taken = []
    while open_pairs:
        best = max(order, key=lambda one: sum((a, b, one[a], one[b]) in open_pairs for a, b in places))
        taken.append(best)
        open_pairs -= {(a, b, best[a], best[b]) for a, b in places}
    return [tuple(axis[i] for axis, i in zip(axes, one, strict=True)) for one in sorted(taken)]
