"""PyTorch internals used here: the active modes and transforms, and how to leave them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., object])


is_under_transforms = torch._C._are_functorch_transforms_active
"""Whether a transform of torch.func is active."""
_active_modes = torch._C._len_torch_dispatch_stack


def is_plain(tensor: Tensor) -> bool:
    """Whether its memory can be read and written here and now.

    Not so in compiled code, for subclasses (FakeTensor, DTensor), and under modes and transforms (make_fx, torch.func,
    dual numbers), which have to see an operation.
    """
    return (
        (type(tensor) is Tensor or type(tensor) is nn.Parameter)
        and not is_compiling()
        and not is_under_transforms()
        and not _active_modes()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
    )


def is_capturing(device: torch.device) -> bool:
    """Whether work for a device is being captured in a graph."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def needs_formula(upstream: Tensor) -> bool:
    """Whether a gradient has to be differentiable (create_graph, dual numbers), or is many (is_grads_batched)."""
    return bool(
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0
        or _functorch.is_legacy_batchedtensor(upstream)
        or _functorch.is_functorch_wrapped_tensor(upstream)
    )


def takes_any_derivative() -> bool:
    """Whether derivatives may be taken of any operation: under transforms, or of dual numbers."""
    return is_under_transforms() or forward_ad._current_level >= 0


def needs_plain_operations() -> bool:
    """Whether the active transforms do not work on an autograd.Function.

    Compiled code and modes such as make_fx's do not see into one, functionalize has no rule for one, and of two levels
    of forward differentiation the outer is lost in its jvp.
    """
    if not is_under_transforms():
        return False
    if is_compiling() or _active_modes():
        return True
    levels = [level.key() for level in _functorch.get_interpreter_stack() or ()]
    kinds = _functorch.TransformType
    return kinds.Functionalize in levels or levels.count(kinds.Jvp) > 1


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Make plain tensors on the CPU to keep, whatever modes, transforms and default device the caller has."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.device("cpu"),
        _disable_current_modes(),
        temporarily_clear_interpreter_stack(),
    ):
        yield


def held_constant(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which imports torch._dynamo, for more than a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def are_constants(numbers: list[float]) -> bool:
    """Whether compiled code has each of the numbers as a constant, and not as a symbol."""
    return all(torch.fx.experimental.symbolic_shapes.has_static_value(number) for number in numbers)
