"""The losses as torch.library ops: what compiled code, tensor subclasses and modes see of a fused backend.

An op takes what a call holds, as its SCHEMA says, and the name of the backend; what it computes is the function of the
same name of :class:`fdu_kernels.registry.Backend`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.checks import accumulation_dtype
from fdu_kernels.registry import backend_named

_GAUSSIAN, _EXPECTATION = (f"{kind.SCHEMA}, str backend" for kind in (GaussianCall, ExpectationCall))


@custom_op("fdu_kernels::gaussian_forward", mutates_args=(), schema=f"({_GAUSSIAN}) -> (Tensor, Tensor)")
def gaussian_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The losses are differentiable in pred."""
    *flat, backend = arguments
    return backend_named(backend).gaussian_forward(GaussianCall.of(*flat))


@custom_op("fdu_kernels::gaussian_backward", mutates_args=(), schema=f"({_GAUSSIAN}, Tensor coefficient) -> Tensor")
def gaussian_backward(*arguments: Any) -> Tensor:
    """The gradient of given coefficients."""
    *flat, backend, coefficient = arguments
    return backend_named(backend).gaussian_backward(GaussianCall.of(*flat), coefficient)


@custom_op("fdu_kernels::gaussian_value_and_grad", mutates_args=(), schema=f"({_GAUSSIAN}) -> (Tensor, Tensor)")
def gaussian_value_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    """In one pass."""
    *flat, backend = arguments
    return backend_named(backend).gaussian_value_and_grad(GaussianCall.of(*flat), None)


@custom_op("fdu_kernels::expectation_forward", mutates_args=(), schema=f"({_EXPECTATION}) -> Tensor")
def expectation_forward(*arguments: Any) -> Tensor:
    """The value, differentiable in v."""
    *flat, backend = arguments
    return backend_named(backend).expectation_forward(ExpectationCall.of(*flat))


@custom_op("fdu_kernels::expectation_backward", mutates_args=(), schema=f"({_EXPECTATION}, Tensor upstream) -> Tensor")
def expectation_backward(*arguments: Any) -> Tensor:
    """The gradient of a given upstream one."""
    *flat, backend, upstream = arguments
    return backend_named(backend).expectation_backward(ExpectationCall.of(*flat), upstream)


@custom_op("fdu_kernels::expectation_value_and_grad", mutates_args=(), schema=f"({_EXPECTATION}) -> (Tensor, Tensor)")
def expectation_value_and_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    """In one pass."""
    *flat, backend = arguments
    return backend_named(backend).expectation_value_and_grad(ExpectationCall.of(*flat))


def _losses(pred: Tensor, target: Tensor, reduction: str) -> Tensor:
    shape = pred.shape[:1] if reduction == "none" else ()
    return pred.new_empty(shape, dtype=accumulation_dtype(pred.dtype, target.dtype))


def _value(v: Tensor, reduction: str) -> Tensor:
    # As the kernels lay it out: like v.
    like = torch.empty_like(v, dtype=accumulation_dtype(v.dtype))
    return like if reduction == "none" else like.new_empty(())


# Reduction stands before grad_scale, which an expectation has twice, and the backend.
gaussian_forward.register_fake(lambda a, b, *_: (_losses(a, b, "none"), _losses(a, b, "none")))
gaussian_value_and_grad.register_fake(lambda a, b, *rest: (_losses(a, b, rest[-3]), torch.empty_like(a)))
expectation_forward.register_fake(lambda v, *rest: _value(v, rest[-4]))
expectation_value_and_grad.register_fake(lambda v, *rest: (_value(v, rest[-4]), torch.empty_like(v)))
for backward in (gaussian_backward, expectation_backward):
    backward.register_fake(lambda like, *_: torch.empty_like(like))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep tensors where autograd looks after them, and what else there is beside them."""
    ctx.others = [None if isinstance(given, Tensor) else given for given in inputs]
    tensors = [given if isinstance(given, Tensor) else None for given in inputs]
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
        ctx.others.append(None)
        tensors.append(output[1])
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> list[Any]:
    """The inputs again, and behind them the second output."""
    return [b if a is None else a for a, b in zip(ctx.saved_tensors, ctx.others, strict=True)]


def _gaussian_grad(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, coefficient = _saved(ctx)
    return gaussian_backward(*inputs, coefficient * upstream), *[None] * (len(inputs) - 1)


def _expectation_grad(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _saved(ctx)
    return expectation_backward(*inputs, upstream.resolve_neg()), *[None] * (len(inputs) - 1)


gaussian_forward.register_autograd(_gaussian_grad, setup_context=_save)
expectation_forward.register_autograd(_expectation_grad, setup_context=_save)
