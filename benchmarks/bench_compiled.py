"""What the compilers make of the GPU kernels, without a GPU: ``python benchmarks/bench_compiled.py [--record FILE]``.

Compiles the CUDA kernels (needs nvcc; minutes, once) and the Triton kernels for every architecture, and prints for each
hot loop the instructions per element, registers, spills, threads per multiprocessor and bytes in flight. ``--record``
keeps the figures for ``make bench-report``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import records
import torch
from compiled import AMD_LOAD, AMD_STORE, GPUS, LOAD, SPECIAL, STORE, Code, Launch, Recorder, code_of

import fdu_kernels as fk
from fdu_kernels import build
from fdu_kernels.calls import ExpectationCall

RECORD = records.HERE / "results" / "compiled.json"
WITHOUT_CLUSTERS = "sm_80"
NVIDIA = tuple(gpu for gpu, (maker, *_) in GPUS.items() if maker == "cuda")
DTYPES = {"Float": torch.float32, "BFloat16": torch.bfloat16}
REGISTER_FILE, REGISTER_STEP, MOST_THREADS = 65536, 8, 2048
"""Of a multiprocessor; registers are given out in steps."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A hot loop: of which kernel, what one way round it passes, and how it is launched.

    name: part of the kernel's mangled name, with {T} for the dtype.
    special: special functions per element; threads: of a block.
    wide: vectors of 16 bytes that one way round reads and writes; None: there is no loop.
    held: elements that it writes, where it reads some from the shared memory; wide does not count.
    """

    title: str
    name: str
    special: int
    wide: tuple[int, int] | None
    threads: int
    held: int = 0

    @property
    def per_batch(self) -> bool:
        """Whether it reads and writes a batch of an expectation's elements."""
        return not self.title.startswith("Gaussian")


CUDA_LOOPS = (
    Loop("variational, jensen_shannon", "KnownE1ELb1ENS0_{T}E", 3, (2, 2), 128),
    Loop("variational, kl", "KnownE2ELb1ENS0_{T}E", 1, (2, 2), 128),
    Loop("density ratio, jensen_shannon", "KnownE3ELb1ENS0_5MixedE", 5, (2, 2), 128),
    Loop("density ratio, kl", "KnownE4ELb1ENS0_5MixedE", 2, (2, 2), 128),
    Loop("Gaussian, on chip", "gaussian_on_chipINS0_{T}ELb0ELi64E", 0, None, 512),
    Loop("Gaussian, clusters in turns", "gaussian_in_clustersINS0_{T}ELb1E", 0, (0, 0), 512, held=64),
    Loop("Gaussian, largest clusters", "gaussian_in_clustersINS0_{T}ELb0E", 0, None, 512),
    Loop("Gaussian, two passes: distance", "gaussian_sumsINS0_{T}ELb0E", 0, (8, 0), 256),
    Loop("Gaussian, two passes: gradient", "gaussian_gradientINS0_{T}ELb0E", 0, (8, 4), 256),
)
TRITON_LOOPS = (
    Loop("variational, jensen_shannon", "", 2, (1, 1), 128),
    Loop("variational, kl", "", 1, (1, 1), 128),
)
MANGLED = {"Float": "5Float", "BFloat16": "8BFloat16"}


def cuda_recipe() -> build.Recipe:
    """The build of CUDA kernels for all architectures; BuildError where there is none."""
    plan = build.recipe(build.ARCHITECTURES)
    if not plan.architectures:
        raise build.BuildError(plan.cuda)
    return plan


def cuda_rows(kernels: Mapping[str, list[Code]]) -> Iterator[records.Row]:
    """A row per hot loop, architecture and dtype, of the kernels by architecture."""
    for gpu, codes in kernels.items():
        for loop in CUDA_LOOPS:
            if gpu == WITHOUT_CLUSTERS and "in_clusters" in loop.name:
                continue
            for dtype in DTYPES if "{T}" in loop.name else ("Float",):
                (code,) = [one for one in codes if loop.name.format(T=MANGLED[dtype]) in one.name]
                yield row_of("cuda", loop, gpu, DTYPES[dtype], code, 2)


def triton_launch(divergence: str, dtype: torch.dtype) -> Launch:
    """That of -B of a variational bound, value and gradient, of 512 MiB."""
    from fdu_kernels.kernels.triton import expectation

    v = torch.empty(512 * 2**20 // dtype.itemsize, dtype=dtype, device="meta")
    function = fk.get_divergence(divergence).critic_functions("log_ratio")[1]
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for name in ("expectation_kernel", "expectation_total"):
            recorder = Recorder(getattr(expectation, name), launches)
            stack.enter_context(mock.patch.object(expectation, name, recorder))
        expectation.expectation_value_and_grad(ExpectationCall(v, function))
    return launches[0]


def triton_rows(gpus: Iterable[str] = tuple(GPUS)) -> Iterator[records.Row]:
    """The same of Triton's kernels, also on AMD."""
    from fdu_kernels.kernels.triton import tuning

    for gpu in gpus:
        maker, _, warp_size = GPUS[gpu]
        with mock.patch.object(tuning, "target_of", mock.Mock(return_value=tuning.Target(maker, warp_size))):
            for loop in TRITON_LOOPS:
                for dtype in DTYPES.values():
                    launch = triton_launch(loop.title.partition(", ")[2], dtype)
                    assert launch.options["num_warps"] * warp_size == loop.threads
                    (code,) = launch.code(gpu)
                    # A program of 1024 elements has 8 for each of 128 threads.
                    yield row_of("triton", loop, gpu, dtype, code, dtype.itemsize // 2)


def row_of(backend: str, loop: Loop, gpu: str, dtype: torch.dtype, code: Code, vectors: int) -> records.Row:
    """The figures of a hot loop; vectors: of a thread in an expectation's loop."""
    nvidia = GPUS[gpu][0] == "cuda"
    load, store = (LOAD, STORE) if nvidia else (AMD_LOAD, AMD_STORE)
    if loop.wide is None:
        way = code.through()
    else:
        wide = (0, loop.held * dtype.itemsize // 16) if loop.held else loop.wide
        wide = (vectors, vectors) if loop.per_batch else wide
        least = {load: wide[0], store: wide[1], SPECIAL: loop.special * wide[0] * 16 // dtype.itemsize}
        way = code.around({pattern: number for pattern, number in least.items() if number})
    loaded, stored = count(way, load), count(way, store)
    elements = max(stored, loaded // 2) * 16 // dtype.itemsize
    row: dict[str, Any] = {
        "backend": backend, "loop": loop.title, "gpu": gpu, "dtype": str(dtype).removeprefix("torch."),
        # AMD's scalar unit runs beside.
        "instructions": count(way, r"^(?!s_)") / elements, "special": count(way, SPECIAL) / elements,
        "registers": code.registers, "spilled": code.spilled,
    }  # fmt: skip
    if nvidia:
        threads = blocks_at_once(code.registers, loop.threads) * loop.threads
        # Without a loop the assembler decides how many loads come before arithmetic has to wait for them.
        marks = ("l" if re.search(load, text) else " " if re.search("FADD|FFMA", text) else "" for text in way)
        most = max(map(len, "".join(marks).split(" "))) if loop.wide is None else loaded
        ahead = vectors if loop.per_batch else 2 * stored if loop.held else most
        row |= {"threads": threads, "in_flight": threads * 16 * ahead}
    return row


def count(way: list[str], pattern: str) -> int:
    """Instructions that match."""
    return sum(bool(re.search(pattern, text)) for text in way)


def blocks_at_once(registers: int, threads: int) -> int:
    """Blocks of a multiprocessor, by its registers and threads."""
    each = -(-registers // REGISTER_STEP) * REGISTER_STEP
    return min(REGISTER_FILE // (each * threads), MOST_THREADS // threads)


def show(row: records.Row, heading: bool) -> None:
    """Print a row in columns; above the first, their names."""
    if heading:
        print(*(f"{name:>{width_of(name)}}" for name in row))
    figures = {name: f"{value:.1f}" if isinstance(value, float) else value for name, value in row.items()}
    print(*(f"{figure:>{width_of(name)}}" for name, figure in figures.items()), flush=True)


def width_of(name: str) -> int:
    """Of a column."""
    return 30 if name == "loop" else max(len(name), 8)


def main() -> None:
    """Compile, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help=f"JSON file to write, such as {RECORD}")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(build.cache_folder() / "triton"))
    plan, rows = cuda_recipe(), list[records.Row]()
    compilers = f"{plan.cuda.rpartition(' by ')[2]} and triton {importlib.metadata.version('triton')}"
    print(compilers, flush=True)
    module = build.built(plan)
    for row in itertools.chain(cuda_rows({gpu: code_of(module, gpu) for gpu in NVIDIA}), triton_rows()):
        show(row, heading=not rows)
        rows.append(row)
    if options.record:
        records.keep(options.record, "compiled", compilers=compilers, rows=rows)


if __name__ == "__main__":
    main()
