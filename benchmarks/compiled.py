"""GPU code on a machine without a GPU: what calls would launch, what the compilers make of it, and its hot loops.

The paths are those of the assembler's code. A hot loop is counted along its shortest way round that reads and writes
vectors of 16 bytes: what guards the end of a tensor, or is for operands that a call lacks, lies beside it.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LOAD, STORE = r"LDG\.E\S*\.128", r"STG\.E\S*\.128"
AMD_LOAD, AMD_STORE = (rf"(?:global|buffer)_{kind}_dwordx4\b" for kind in ("load", "store"))
SPECIAL = r"MUFU|v_(?:exp|log|rcp|rsq)_"
"""Of exponentials, logarithms and reciprocals, of which a multiprocessor does a few at a time."""
GPUS = {
    **{f"sm_{number}": ("cuda", number, 32) for number in (80, 90, 100)},
    **{name: ("hip", name, 64) for name in ("gfx942", "gfx950")},
}
"""Triton's name of the maker, its name of the device, threads of a warp."""
NAMES = {
    torch.bool: "u1", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip


# Instructions


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel as the assembler made it."""

    name: str
    registers: int
    spilled: int  # bytes
    instructions: tuple[str, ...]
    following: tuple[tuple[int, ...], ...]  # of each instruction

    def around(self, least: Mapping[str, int]) -> list[str]:
        """The shortest way round a loop past so many instructions of each pattern; [] if there is none."""
        marked = [tuple(bool(re.search(mark, text)) for mark in least) for text in self.instructions]
        heads = {to for at, following in enumerate(self.following) for to in following if to <= at}
        ways = [way for head in sorted(heads) if (way := self._around(head, marked, tuple(least.values())))]
        return [self.instructions[at] for at in min(ways, key=len, default=[])]

    def _around(self, head: int, marked: Sequence[tuple[bool, ...]], least: tuple[int, ...]) -> list[int]:
        """The same of the loop that begins there."""
        Place = tuple[int, tuple[int, ...]]  # an instruction, and how many of each pattern came before it
        before: dict[Place, Place | None] = {}
        queue: list[tuple[int, Place, Place | None]] = [(0, (head, (0,) * len(least)), None)]
        while queue:
            length, place, origin = heapq.heappop(queue)
            if place in before:
                continue
            before[place] = origin
            at, passed = place
            now = tuple(min(count + one, most) for count, one, most in zip(passed, marked[at], least, strict=True))
            for to in self.following[at]:
                if to == head and now == least:
                    way, step = [], place
                    while step is not None:
                        way.append(step[0])
                        step = before[step]
                    return way[::-1]
                if to != head:
                    heapq.heappush(queue, (length + 1, (to, now), place))
        return []

    def after(self, mark: str, once: bool = False) -> list[str]:
        """What may be executed after an instruction of a pattern; once: without another turn of a loop."""
        onward = [[to for to in ways if to > at or not once] for at, ways in enumerate(self.following)]
        seen: set[int] = set()
        waiting = [to for at, text in enumerate(self.instructions) if re.search(mark, text) for to in onward[at]]
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                waiting += onward[at]
        return [self.instructions[at] for at in sorted(seen)]

    def through(self) -> list[str]:
        """The way from the first instruction to the last past the most accesses of 16 bytes, and of those the shortest;
        loops are not gone round."""
        best: dict[int, tuple[int, int, int]] = {}  # accesses, minus the length, the next
        waiting, open_ways = [0], set[int]()
        while waiting:  # depth first: what follows comes before
            at = waiting[-1]
            if at not in open_ways and at not in best:
                open_ways.add(at)
                waiting += [to for to in self.following[at] if to not in open_ways and to not in best]
                continue
            waiting.pop()
            if at in best:
                continue
            open_ways.remove(at)
            ends = [(*best[to][:2], to) for to in self.following[at] if to in best and best[to][0] >= 0]
            # Where all that follows is on the way already, it leads only round.
            accesses, length, to = max(ends, default=(0 if not self.following[at] else -1, 0, -1))
            wide = accesses >= 0 and bool(re.search(f"{LOAD}|{STORE}", self.instructions[at]))
            best[at] = accesses + wide, length - 1, to
        way, at = [], 0
        while at >= 0:
            way.append(self.instructions[at])
            at = best[at][2]
        return way


def code_of(binary: Path, architecture: str | None = None) -> list[Code]:
    """The kernels of an NVIDIA binary, of a module those of one architecture ("sm_90")."""
    chosen = ["--gpu-architecture", architecture] if architecture else []
    usage = dump(binary, "--dump-resource-usage", *chosen)
    used = {
        name: {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", numbers)}
        for name, numbers in re.findall(r"Function (\w+):\n *(.*)", usage)
    }
    bodies = re.findall(r"Function : (\w+)\n(.*?)(?=\n\t*\.{5}|\Z)", dump(binary, "--dump-sass", *chosen), re.DOTALL)
    return [
        Code(name, used[name]["REG"], used[name]["STACK"] + used[name]["LOCAL"], *nvidia_instructions(body))
        for name, body in bodies
    ]


def dump(binary: Path, *options: str) -> str:
    """What cuobjdump, which Triton brings, says; FileNotFoundError where there is none."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        raise FileNotFoundError("cuobjdump comes with triton, which is not installed")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), *options, str(binary)], capture_output=True, text=True, check=True).stdout


def nvidia_instructions(body: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The instructions of a listing, and which may follow each."""
    listed = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]+?)\s*;", body)]
    places = {address: at for at, (address, _) in enumerate(listed)}
    following = []
    for at, (_, text) in enumerate(listed):
        guard, word, rest = re.fullmatch(r"(@!?U?P\w+\s+)?(\S+)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        onward = [at + 1] if at + 1 < len(listed) else []
        if word.startswith("BRA"):
            jumps = bool(guard or re.match(r"\s*!?U?P\d", rest) or "DIV" in word)
            onward = [*(onward if jumps else []), places[int(re.findall(r"0x([0-9a-f]+)", rest)[-1], 16)]]
        elif word.startswith(("EXIT", "RET", "BRX")) and not guard:
            onward = []
        following.append(tuple(onward))
    # A jump by a table leads to what nothing else leads to, up to the next of these jumps.
    reached = {to for onward in following for to in onward}
    tables = [at for at, (_, text) in enumerate(listed) if text.startswith("BRX")]
    for at, end in zip(tables, [*tables, len(listed)][1:], strict=True):
        following[at] = tuple(to for to in range(at + 1, end) if to not in reached)
    return tuple(text for _, text in listed), tuple(following)


def amd_instructions(assembly: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """The same of an AMD compiler's assembly."""
    texts: list[str] = []
    places: dict[str, int] = {}
    for line in assembly.partition("s_endpgm")[0].splitlines():
        line = line.partition(";")[0].strip()
        if label := re.fullmatch(r"(\.\w+):", line):
            places[label[1]] = len(texts)
        elif re.match(r"[a-z]+_", line):
            texts.append(line)
    texts.append("s_endpgm")
    following = []
    for at, text in enumerate(texts):
        onward = [at + 1] if at + 1 < len(texts) and not text.startswith("s_branch") else []
        target = re.match(r"s_c?branch\w* (\.\w+)", text)
        following.append((*onward, *([places[target[1]]] if target and target[1] in places else [])))
    return tuple(texts), tuple(following)


# Triton


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, as a call would launch it."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def code(self, gpu: str) -> list[Code]:
        """The same as instructions."""
        compiled = self.compiled(gpu)
        if GPUS[gpu][0] == "hip":
            assembly = compiled.asm["amdgcn"]
            found = {key: int(number) for key, number in re.findall(r"^[ -]*\.(\w+): +(\d+)$", assembly, re.M)}
            registers = found["vgpr_count"] + found["agpr_count"]
            spilled = found["vgpr_spill_count"] + found["private_segment_fixed_size"]
            return [Code(self.name, registers, spilled, *amd_instructions(assembly))]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            return code_of(Path(file.name))

    def compiled(self, gpu: str) -> Any:
        """Its code, with the types and divisibilities that the launch would have found."""
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        assert len(self.kernel.params) == len(self.arguments)
        for i, (parameter, argument) in enumerate(zip(self.kernel.params, self.arguments, strict=True)):
            if parameter.is_constexpr:
                constants[(i,)] = argument
                signature[parameter.name] = "constexpr"
            else:
                specialize = not parameter.do_not_specialize
                signature[parameter.name] = argument_type(argument, (i,), specialize, constants, attributes, gpu)
        return compile_once(self.kernel, *map(Hashable, (signature, constants, attributes, self.options)), gpu)


class Hashable:
    """A dictionary as part of a key of the cache."""

    def __init__(self, content: dict[Any, Any]) -> None:
        self.content, self.key = content, repr(sorted(content.items(), key=repr))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hashable) and self.key == other.key


@functools.cache
def compile_once(
    kernel: Any, signature: Hashable, constants: Hashable, attributes: Hashable, options: Hashable, gpu: str
) -> Any:
    """What Triton's compiler makes of a kernel, kept."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature.content, constants.content, attributes.content)
    return triton.compile(source, target=GPUTarget(*GPUS[gpu]), options=options.content)


def argument_type(
    argument: Any,
    path: tuple[int, ...],
    specialize: bool,
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    gpu: str,
) -> Any:
    """Triton's name of an argument's type; adds what a launch knows of its value."""
    if isinstance(argument, tuple):
        return tuple(
            argument_type(item, (*path, i), True, constants, attributes, gpu) for i, item in enumerate(argument)
        )
    if argument is None or (isinstance(argument, int) and argument == 1 and specialize):
        constants[path] = argument
        return "constexpr"
    if isinstance(argument, float):
        return "fp32"
    if isinstance(argument, int):
        if specialize and argument % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= argument < 2**31 else "i64"
    assert isinstance(argument, Tensor)
    attributes[path] = [["tt.divisibility", 16]]
    if GPUS[gpu][0] == "hip" and argument.untyped_storage().nbytes() < 2**31:
        attributes[path].append(["tt.pointer_range", 32])
    return "*" + NAMES[argument.dtype]


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: int) -> None:
            self.launches.append(Launch(self.kernel, grid[0], arguments, options))

        return launch
