"""Dispatch of a call: straight to the kernels, to an op that compiled code can hold, or to a special case.

docs/design.md, "Backends", has the table of ways.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fdu_kernels import autograd, formulas, sharded, torch_ops, transforms
from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.internals import is_under_transforms, needs_plain_operations, takes_any_derivative
from fdu_kernels.registry import backend_named, choose_backend


def gaussian(call: GaussianCall, backend: str | None) -> Tensor:
    """The loss, differentiable in pred. If asked for, s is in the call afterwards."""
    name = choose_backend(backend, call)
    if call.plain:
        return autograd.gaussian(call, backend_named(name))
    if sharded.is_sharded(call.pred):
        return sharded.gaussian(call, lambda local: gaussian(local.checked(), name))
    way = _way(name)
    if way is formulas:
        return formulas.gaussian(call)
    if way is transforms:
        return transforms.gaussian(call, backend_named(name))
    losses, _, call.s = torch_ops.gaussian_forward(*call.flat(), name)
    return formulas.reduce(losses, call.reduction)


def gaussian_value_and_grad(call: GaussianCall, grad_out: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    """The reduced loss, and the gradient of its sum times grad_scale. If asked for, s is in the call afterwards."""
    name = choose_backend(backend, call)
    if call.plain:
        if grad_out is not None:
            torch.autograd.graph.increment_version(grad_out)
        return backend_named(name).gaussian_value_and_grad(call, grad_out)
    way = _way(name)
    if sharded.is_sharded(call.pred):
        value, grad = sharded.gaussian_value_and_grad(
            call, lambda local: gaussian_value_and_grad(local.checked(), None, name)
        )
    elif way is transforms:
        value, grad = transforms.gaussian_value_and_grad(call, backend_named(name))
    else:
        if not takes_any_derivative():
            call.pred = call.pred.detach()
        if way is formulas:
            value, grad = formulas.gaussian_value_and_grad(call)
        else:
            value, grad, call.s = torch_ops.gaussian_value_and_grad(*call.flat(), name)
    return value, grad if grad_out is None else grad_out.copy_(grad.detach())


def expectations(calls: tuple[ExpectationCall, ...], backend: str | None) -> Tensor:
    """The sum of the calls' values, differentiable in each v."""
    name = choose_backend(backend, calls[0] if calls[0].v.dtype == torch.float64 else calls[-1])
    if all(call.plain for call in calls):
        return autograd.expectations(calls, backend_named(name))
    terms = [_expectation(call, name) for call in calls]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _expectation(call: ExpectationCall, name: str) -> Tensor:
    if sharded.is_sharded(call.v):
        return sharded.expectation(call, lambda local: expectations((local.checked("v"),), name))
    way = _way(name)
    if way is formulas:
        return formulas.expectation(call)
    if way is transforms:
        return formulas.expectation(transforms.by_kernels(call, backend_named(name)))
    return torch_ops.expectation_forward(*call.flat(), name)


def expectation_value_and_grad(call: ExpectationCall, backend: str | None) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of its sum times grad_scale."""
    name = choose_backend(backend, call)
    if call.plain:
        return backend_named(name).expectation_value_and_grad(call)
    if sharded.is_sharded(call.v):
        return sharded.expectation_value_and_grad(call, lambda one: expectation_value_and_grad(one.checked("v"), name))
    way = _way(name)
    if way is transforms:
        return formulas.expectation_value_and_grad(transforms.by_kernels(call, backend_named(name)))
    if not takes_any_derivative():
        call.v = call.v.detach()
    if way is formulas:
        return formulas.expectation_value_and_grad(call)
    return torch_ops.expectation_value_and_grad(*call.flat(), name)


def _way(name: str) -> ModuleType:
    """The module that handles tensors that are not plain: formulas, transforms or torch_ops."""
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record these losses; use torch.export or torch.compile")
    if name == "torch":
        return formulas
    if not is_under_transforms():
        return formulas if takes_any_derivative() else torch_ops
    return formulas if needs_plain_operations() else transforms
