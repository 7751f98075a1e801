"""Blocks of a transformer that stay on the CPU, and come to the device one after another, to draw and to train.

diffusers' group offloading exchanges the data of parameters, which autograd has saved, so no gradient can pass it. Here
the parameters themselves are exchanged: what autograd has saved stays as it was. With gradient checkpointing a block
is on the device for one forward pass, and then for its second one and its backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fdu.models import parts

MARK = "_fdu_offloading"
"""The attribute of a model that holds its offloading."""


def offload_blocks(pipeline: DiffusionPipeline, device: str) -> None:
    """Let the blocks of the pipeline's denoiser come from the CPU to the device when they are called. The rest of the
    denoiser goes to the device, and the other parts of the pipeline stay where they are.

    Raises:
        ValueError: the denoiser is no transformer with blocks.
    """
    name = parts.denoiser_name(pipeline)
    module = getattr(pipeline, name)
    blocks = blocks_of(module)
    if name != "transformer" or not blocks:
        raise ValueError(
            f"offload serves transformers, and this pipeline's {name} has no blocks that follow one another; leave it "
            "out, or choose a quantization"
        )
    setattr(module, MARK, Offloading(module, blocks, torch.device(device)))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer, in their order."""
    return [block for part in module.children() if isinstance(part, nn.ModuleList) for block in part]


def offloads(module: nn.Module) -> bool:
    """Whether the blocks of a module are offloaded by :func:`offload_blocks`."""
    return MARK in vars(module)


def called_on(module: nn.Module) -> torch.device | None:
    """The device to which the offloaded blocks of a module come; None if it has none."""
    return vars(module)[MARK].device if offloads(module) else None


@contextmanager
def drawable(pipeline: Any) -> Iterator[None]:
    """Within this context the other parts of a pipeline are where the blocks of its denoiser are called, so that it can
    draw; a pipeline without offloaded blocks stays as it is."""
    device = next(filter(None, map(called_on, parts.models(pipeline).values())), None)
    others: list[tuple[nn.Module, torch.device]] = []
    if device is not None:
        modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module) and not offloads(part)]
        others = [(part, weight.device) for part in modules for weight in [*part.parameters()][:1]]
    try:
        for part, _ in others:
            part.to(device)
        yield
    finally:
        for part, former in others:
            part.to(former)


class Offloading:
    """The blocks of a module, of which one at a time is on the device."""

    def __init__(self, module: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
        self.device = device
        self.homes: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        """The parameters of each block on the CPU, with their places."""
        self.here: nn.Module | None = None
        """The block that is on the device."""
        for block in blocks:
            owners = [(part, name) for part in block.modules() for name in part._parameters]
            found = [(part, name, part._parameters[name]) for part, name in owners]
            self.homes[block] = [(part, name, weight) for part, name, weight in found if weight is not None]
            for _, _, weight in self.homes[block]:
                data = weight.data.to("cpu")
                weight.data = data.pin_memory() if device.type == "cuda" else data
            for buffer in block.buffers():
                buffer.data = buffer.data.to(device)
            block.register_forward_pre_hook(self._enter)
        away = {id(weight) for homes in self.homes.values() for _, _, weight in homes}
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in away:
                tensor.data = tensor.data.to(device)

    def _enter(self, block: nn.Module, given: Any) -> None:
        if block is self.here:
            return
        self.leave()
        for part, name, weight in self.homes[block]:
            data = weight.data.to(self.device, non_blocking=True, copy=True)
            part._parameters[name] = nn.Parameter(data, requires_grad=False)
        self.here = block

    def leave(self) -> None:
        """Leave no block on the device."""
        if self.here is not None:
            for part, name, weight in self.homes[self.here]:
                part._parameters[name] = weight
        self.here = None
