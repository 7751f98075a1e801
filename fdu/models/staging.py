"""Copies to the device for which the host does not wait: it would idle until all work before them is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fdu.models.parts import TOKENIZERS

ALONE = {"cuda"}
"""Types of devices that copy from pinned memory by themselves."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device."""
    if device.type not in ALONE:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def staged(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within this context the host does not wait for the tokens of prompts that the pipeline encodes."""
    found = {name: getattr(pipeline, name, None) for name in TOKENIZERS.values()}
    tokenizers = {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}
    # Not by setattr, at which the pipeline would change its record of its parts.
    vars(pipeline).update({name: _Staged(tokenizer) for name, tokenizer in tokenizers.items()})
    try:
        yield
    finally:
        vars(pipeline).update(tokenizers)


class _Staged:
    """A tokenizer whose tensors go to a device by :func:`to_device`."""

    def __init__(self, tokenizer: Any) -> None:
        vars(self)["tokenizer"] = tokenizer

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with torch.device("cpu"):
            read = self.tokenizer(*arguments, **options)
        for name, value in read.items():
            if isinstance(value, Tensor):
                read[name] = value.as_subclass(_Tokens)
        return read

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["tokenizer"], name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.tokenizer, name, value)


class _Tokens(Tensor):
    """Tokens or their mask on the CPU; the results of all operations are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def to(self, *arguments: Any, **options: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        if len(arguments) == 1 and not options and isinstance(arguments[0], (str, torch.device)):
            return to_device(plain, torch.device(arguments[0]))
        return plain.to(*arguments, **options)
