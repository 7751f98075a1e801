"""The losses as torch.library ops: what compiled code, tensor subclasses and modes see of a fused backend.

An op takes what a call holds, as its SCHEMA says, and the name of the backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.checks import accumulation_dtype
from fdu_kernels.registry import backend_named


@custom_op(
    "fdu_kernels::gaussian_forward", mutates_args=(), schema=f"({GaussianCall.SCHEMA}, str backend) -> (Tensor, Tensor)"
)
def gaussian_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See Backend.gaussian_forward; the losses are differentiable in pred."""
    return backend_named(arguments[-1]).gaussian_forward(GaussianCall.of(*arguments[:-1]))


@gaussian_forward.register_fake
def _(pred: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    losses = _losses(pred, target)
    return losses, torch.empty_like(losses)


@custom_op(
    "fdu_kernels::gaussian_backward",
    mutates_args=(),
    schema=f"({GaussianCall.SCHEMA}, str backend, Tensor coefficient) -> Tensor",
)
def gaussian_backward(*arguments: Any) -> Tensor:
    """See Backend.gaussian_backward."""
    *flat, backend, coefficient = arguments
    return backend_named(backend).gaussian_backward(GaussianCall.of(*flat), coefficient)


@gaussian_backward.register_fake
def _(pred: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(pred)


@custom_op(
    "fdu_kernels::gaussian_value_and_grad",
    mutates_args=(),
    schema=f"({GaussianCall.SCHEMA}, str backend) -> (Tensor, Tensor)",
)
def gaussian_value_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See Backend.gaussian_value_and_grad."""
    return backend_named(arguments[-1]).gaussian_value_and_grad(GaussianCall.of(*arguments[:-1]), None)


@gaussian_value_and_grad.register_fake
def _(pred: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    losses = _losses(pred, target)
    return losses if rest[-3] == "none" else losses.new_empty(()), torch.empty_like(pred)


@custom_op(
    "fdu_kernels::expectation_forward", mutates_args=(), schema=f"({ExpectationCall.SCHEMA}, str backend) -> Tensor"
)
def expectation_forward(*arguments: Any) -> Tensor:
    """See Backend.expectation_forward; differentiable in v."""
    return backend_named(arguments[-1]).expectation_forward(ExpectationCall.of(*arguments[:-1]))


@expectation_forward.register_fake
def _(v: Tensor, *rest: Any) -> Tensor:
    return _value(v, rest[-4])


@custom_op(
    "fdu_kernels::expectation_backward",
    mutates_args=(),
    schema=f"({ExpectationCall.SCHEMA}, str backend, Tensor upstream) -> Tensor",
)
def expectation_backward(*arguments: Any) -> Tensor:
    """See Backend.expectation_backward."""
    *flat, backend, upstream = arguments
    return backend_named(backend).expectation_backward(ExpectationCall.of(*flat), upstream)


@expectation_backward.register_fake
def _(v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v)


@custom_op(
    "fdu_kernels::expectation_value_and_grad",
    mutates_args=(),
    schema=f"({ExpectationCall.SCHEMA}, str backend) -> (Tensor, Tensor)",
)
def expectation_value_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See Backend.expectation_value_and_grad."""
    return backend_named(arguments[-1]).expectation_value_and_grad(ExpectationCall.of(*arguments[:-1]))


@expectation_value_and_grad.register_fake
def _(v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _value(v, rest[-4]), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep tensors where autograd looks after them, and what else there is beside them."""
    tensors = [given if isinstance(given, Tensor) else None for given in inputs]
    ctx.others = [None if isinstance(given, Tensor) else given for given in inputs]
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
        tensors.append(output[1])
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> list[Any]:
    """The inputs again, and behind them the second output."""
    others = [*ctx.others, *[None] * (len(ctx.saved_tensors) - len(ctx.others))]
    return [other if tensor is None else tensor for tensor, other in zip(ctx.saved_tensors, others, strict=True)]


def _gaussian_grad(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, coefficient = _saved(ctx)
    return gaussian_backward(*inputs, coefficient * upstream), *[None] * (len(inputs) - 1)


def _expectation_grad(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _saved(ctx)
    return expectation_backward(*inputs, upstream.resolve_neg()), *[None] * (len(inputs) - 1)


gaussian_forward.register_autograd(_gaussian_grad, setup_context=_save)
expectation_forward.register_autograd(_expectation_grad, setup_context=_save)


def _losses(pred: Tensor, target: Tensor) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=accumulation_dtype(pred.dtype, target.dtype))


def _value(v: Tensor, reduction: str) -> Tensor:
    # As the kernels lay it out: like v.
    like = torch.empty_like(v, dtype=accumulation_dtype(v.dtype))
    return like if reduction == "none" else like.new_empty(())
