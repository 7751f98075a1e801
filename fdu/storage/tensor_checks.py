"""Checks of tensors from files of any origin. Each error names the tensor, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
"""The dtypes of weights: those that PyTorch converts into each other, number by number."""
NAME_LENGTH = 500
"""Characters of the longest name."""


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no weight of any model, whatever its use.

    Raises:
        ValueError: a name that cannot be shown, a tensor without plain content, or a number that is not finite.
    """
    for name, tensor in tensors.items():
        check_name(name)
        kind = _kind(tensor)
        if kind:
            raise ValueError(f"the tensor {name} is {kind}; ask its author for a file of plain tensors")
        if tensor.is_floating_point() and tensor.dtype in FLOATS and not is_finite(tensor):
            raise ValueError(
                f"the tensor {name} has numbers that are not finite (NaN or infinity); the training that made it "
                "diverged, or the file is damaged"
            )


def check_name(name: str) -> None:
    """Raise ValueError for a name that is too long, or that a terminal would not show as it is."""
    if len(name) > NAME_LENGTH:
        raise ValueError(
            f"the name {name[:20]!r}... of a tensor is longer than {NAME_LENGTH} characters; not of a model"
        )
    if not name.isprintable():
        raise ValueError(f"the name {name!r} of a tensor has characters that cannot be shown; it is not of a model")


def check_floats(name: str, tensor: Tensor, dimensions: int = 0) -> None:
    """Raise ValueError unless a tensor has this many dimensions or more, and a dtype of weights."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"the tensor {name} is of {tensor.dtype}; weights are of floats, so convert it to float32")
    if tensor.ndim < dimensions:
        what = "a matrix" if dimensions == 2 else "one number per output"
        raise ValueError(f"the tensor {name} has shape {tuple(tensor.shape)}, but is {what} in every LoRA")


def check_range(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if finite numbers become infinite in a dtype of fewer bits."""
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not is_finite(tensor.to(dtype)):
        raise ValueError(
            f"the tensor {name} has numbers in {tensor.dtype} that {dtype} cannot hold; load the pipeline in float32"
        )


def one_number(name: str, tensor: Tensor) -> float:
    """The number in a tensor of one element.

    Raises:
        ValueError: there are more or none, or it is no real number.
    """
    if tensor.numel() != 1:
        raise ValueError(f"the tensor {name} has shape {tuple(tensor.shape)}, but is one number in every LoRA")
    if tensor.dtype not in FLOATS and (tensor.dtype == torch.bool or tensor.is_complex()):
        raise ValueError(f"the tensor {name} is of {tensor.dtype}, but is one real number in every LoRA")
    return float(tensor.item())


def real_number(what: str, value: Any) -> float:
    """The number that metadata state as ``what``.

    Raises:
        ValueError: it is no finite number.
    """
    number = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            value = "of hundreds of digits"
    if not math.isfinite(number):
        raise ValueError(f"its metadata state {value!r} as {what}, which is not a finite number; correct them")
    return number


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; without a copy of the tensor where PyTorch can do so."""
    if not tensor.numel():
        return True
    if tensor.itemsize < 2:
        tensor = tensor.float()
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor.detach()))


def _kind(tensor: Tensor) -> str:
    """What a tensor is that is not plain; empty for one that is."""
    if type(tensor.data) is not Tensor:
        return f"a {type(tensor.data).__name__}"
    if tensor.is_nested or tensor.layout is not torch.strided:
        return f"sparse or nested ({tensor.layout})"
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.is_meta:
        return 'without content (on the device "meta")'
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return "expanded: it has more elements than it stores"
    return ""
