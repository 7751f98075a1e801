"""Launch tables: block sizes and warps by problem size. Fixed, so that a result depends on shapes and dtypes alone."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

TABLE_WARP = 32
"""Threads of a warp as the tables count them."""
ON_CHIP = ((256, 1), (512, 2), (1024, 4), (2048, 4), (4096, 8), (8192, 16), (16384, 16), (32768, 32))
"""(elements, warps) of a program that holds a whole sample in registers: the first that is large enough."""
ON_CHIP_REGISTERS = {1: 128, 2: 128, 4: 128, 8: 200, 16: 128, 32: None}
"""By warps: registers per thread. The assembler would rather spill a few bytes than take more than 32 or 80; with 32
warps, which leave a thread 64 at most, it does better when left alone."""
ON_CHIP_LIMIT = {"linear": 32768, "masked": 16384, "strided": 4096}
"""The largest sample by the walk: "linear" without a mask; "masked"; or positions decomposed for the data, too."""
ON_CHIP_UNALIGNED_LIMIT, ON_CHIP_TABLE_LIMIT = 8192, 16384
"""The same where elements are loaded one by one, and with a tabulated profile, which needs registers as well."""

STREAM_BLOCK = {
    ("linear", 2): 4096, ("masked", 2): 2048, ("strided", 2): 1024,
    ("linear", 4): 2048, ("masked", 4): 2048, ("strided", 4): 1024,
}  # fmt: skip
"""By walk and element size: elements that STREAM_WARPS take at a time, up to 32 bytes per thread and tensor."""
STREAM_WARPS, STREAM_PROGRAMS = 8, 2048
"""About as many programs as a sample or batch is cut into: some for each of up to 200 multiprocessors."""
STREAM_MOST_BLOCKS = 32
"""The most blocks a program takes, so that no lane adds more than 32 numbers in sequence in float32."""
WHOLE_LIMIT = 32768
"""Up to here the forward pass leaves a sample to one program, and needs a single launch."""
PARTIALS_BLOCK, FINISH_WARPS = 256, 4
"""Partial sums that a program adds up at a time."""

EXPECTATION_BLOCK, EXPECTATION_WARPS, EXPECTATION_PROGRAMS, EXPECTATION_REGISTERS = 1024, 4, 4096, 128
TOTAL_BLOCK, TOTAL_WARPS = 8192, 16
"""Like PARTIALS_BLOCK: with up to this many programs, one load reads all their sums."""


class Target(NamedTuple):
    """The hardware that a launch is compiled for."""

    name: str  # Triton's: "cuda" (NVIDIA), "hip" (AMD), "xpu" (Intel)
    warp_size: int

    def options(self, warps: int, registers: int | None = None) -> dict[str, int]:
        """The launch's options for as many threads as the tables say; only NVIDIA's compiler is told of registers."""
        options = {"num_warps": max(warps * TABLE_WARP // self.warp_size, 1)}
        if registers is not None and self.name == "cuda":
            options["maxnreg"] = registers
        return options


@functools.cache
def target_of(device: torch.device) -> Target:
    """The hardware that kernels on a device are compiled for; without a GPU, an NVIDIA one."""
    if device.type == "xpu":
        return Target("xpu", TABLE_WARP)
    if device.type == "cuda" and torch.version.hip is not None:
        return Target("hip", torch.cuda.get_device_properties(device).warp_size)
    return Target("cuda", TABLE_WARP)


class Split(NamedTuple):
    """A sample cut into ``parts`` programs that take up to ``blocks`` blocks of ``block`` elements each."""

    block: int
    blocks: int
    parts: int
    warps: int


def on_chip(extent: int, walk: str, aligned: bool, tabulated: bool) -> tuple[int, int] | None:
    """(elements, warps) of a program that holds ``extent`` elements; None if no program can."""
    limit = ON_CHIP_LIMIT[walk]
    if not aligned:
        limit = min(limit, ON_CHIP_UNALIGNED_LIMIT)
    if tabulated:
        limit = min(limit, ON_CHIP_TABLE_LIMIT)
    return next(((block, warps) for block, warps in ON_CHIP if extent <= block <= limit), None)


def stream(extent: int, batch: int, walk: str, itemsize: int, one_launch: bool = False) -> Split:
    """How samples of ``extent`` elements are cut; one_launch: not at all, if they are small or fill the device."""
    block = STREAM_BLOCK[walk, itemsize]
    count = max(-(-extent // block), 1)
    if one_launch and (extent <= WHOLE_LIMIT or (batch >= STREAM_PROGRAMS // 8 and count <= STREAM_MOST_BLOCKS)):
        return Split(block, count, 1, STREAM_WARPS)
    blocks = min(max(count * batch // STREAM_PROGRAMS, 1), STREAM_MOST_BLOCKS)
    return Split(block, blocks, -(-count // blocks), STREAM_WARPS)


def expectation(size: int) -> Split:
    """How all elements are cut for the elementwise kernels."""
    count = max(-(-size // EXPECTATION_BLOCK), 1)
    few = count <= STREAM_MOST_BLOCKS // 4
    blocks = count if few else min(max(count // EXPECTATION_PROGRAMS, 1), STREAM_MOST_BLOCKS)
    return Split(EXPECTATION_BLOCK, blocks, -(-count // blocks), EXPECTATION_WARPS)
