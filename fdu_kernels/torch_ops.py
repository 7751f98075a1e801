"""The losses as torch.library ops: what compiled code, tensor subclasses and modes see of a fused backend.

An op takes what a call holds, as its SCHEMA says, and the name of the backend; what it computes is the function of the
same name of :class:`fdu_kernels.registry.Backend`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.checks import accumulation_dtype
from fdu_kernels.profiles import widest_dtype
from fdu_kernels.registry import backend_named


def _op(name: str, kind: type[GaussianCall] | type[ExpectationCall], returns: str, also: str = "") -> CustomOpDef:
    """The op for that function of a backend, and behind its outputs s, empty where it is not asked for.

    ``also``: the parameter that the function has besides the call; a backward returns no s.
    """

    def compute(*arguments: Any) -> Any:
        arguments, beside = (arguments[:-1], arguments[-1:]) if also else (arguments, ())
        *flat, backend = arguments
        call: Any = kind.of(*flat)
        found = getattr(backend_named(backend), name)(call, *beside)
        if kind is ExpectationCall or also:
            return found
        return *found, call.pred.new_empty(0) if call.s is None else call.s

    schema = f"({kind.SCHEMA}, str backend{also}) -> {returns}"
    return custom_op(f"{__package__}::{name}", compute, mutates_args=(), schema=schema)


gaussian_forward = _op("gaussian_forward", GaussianCall, "(Tensor, Tensor, Tensor)")
gaussian_backward = _op("gaussian_backward", GaussianCall, "Tensor", ", Tensor coefficient")
gaussian_value_and_grad = _op("gaussian_value_and_grad", GaussianCall, "(Tensor, Tensor, Tensor)")
expectation_forward = _op("expectation_forward", ExpectationCall, "Tensor")
expectation_backward = _op("expectation_backward", ExpectationCall, "Tensor", ", Tensor upstream")
expectation_value_and_grad = _op("expectation_value_and_grad", ExpectationCall, "(Tensor, Tensor)")


def _losses(pred: Tensor, target: Tensor, reduction: str) -> Tensor:
    shape = pred.shape[:1] if reduction == "none" else ()
    return pred.new_empty(shape, dtype=accumulation_dtype(pred.dtype, target.dtype))


def _value(v: Tensor, reduction: str) -> Tensor:
    # As the kernels lay it out: like v.
    like = torch.empty_like(v, dtype=accumulation_dtype(v.dtype))
    return like if reduction == "none" else like.new_empty(())


def _distances(pred: Tensor, wanted: bool) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=widest_dtype(pred.device)) if wanted else pred.new_empty(0)


# Reduction stands before grad_scale, which an expectation has twice, and the backend; return_distance two before it.
gaussian_forward.register_fake(
    lambda a, b, *rest: (_losses(a, b, "none"), _losses(a, b, "none"), _distances(a, rest[-5]))
)
gaussian_value_and_grad.register_fake(
    lambda a, b, *rest: (_losses(a, b, rest[-3]), torch.empty_like(a), _distances(a, rest[-5]))
)
expectation_forward.register_fake(lambda v, *rest: _value(v, rest[-4]))
expectation_value_and_grad.register_fake(lambda v, *rest: (_value(v, rest[-4]), torch.empty_like(v)))
for backward in (gaussian_backward, expectation_backward):
    backward.register_fake(lambda like, *_: torch.empty_like(like))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep tensors where autograd looks after them, and everything else in the context."""
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(*output[1:])
        inputs = (*inputs, output[1])
    ctx.others = [None if isinstance(kept, Tensor) else kept for kept in inputs]
    ctx.save_for_backward(*(kept if isinstance(kept, Tensor) else None for kept in inputs))


def _saved(ctx: Any) -> list[Any]:
    """The inputs again, and behind them the second output."""
    return [b if a is None else a for a, b in zip(ctx.saved_tensors, ctx.others, strict=True)]


def _gaussian_grad(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, coefficient = _saved(ctx)
    return gaussian_backward(*inputs, coefficient * upstream), *[None] * (len(inputs) - 1)


def _expectation_grad(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    inputs = _saved(ctx)
    return expectation_backward(*inputs, upstream.resolve_neg()), *[None] * (len(inputs) - 1)


gaussian_forward.register_autograd(_gaussian_grad, setup_context=_save)
expectation_forward.register_autograd(_expectation_grad, setup_context=_save)
