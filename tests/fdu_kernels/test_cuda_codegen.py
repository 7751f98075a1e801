"""The compiled CUDA kernels without a GPU: architectures, registers, spills, 16-byte accesses, loading without one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdu_kernels import build

# The three architectures take some minutes, once; afterwards they are in the cache. So is what `make wheel` built.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
MOST_REGISTERS = 128
KERNELS = 60
"""Of one architecture: of the Gaussian losses 36 for vectors of one dtype and 6 for all pairs; of expectations 12 for
vectors of one dtype and 6 for all."""


@pytest.fixture(scope="module")
def module() -> Path:
    """The extension module with the kernels that a distribution carries."""
    try:
        plan = build.recipe(build.ARCHITECTURES)
    except build.BuildError as error:
        pytest.skip(str(error))
    if not plan.architectures:
        pytest.skip(plan.cuda)
    for left in ROOT.glob(f"build/temp*/{plan.key}/_C.so"):
        return left
    return build.built(plan)


def dump(module: Path, *options: str) -> str:
    """What cuobjdump, which Triton brings, says of it."""
    triton = importlib.util.find_spec("triton")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    if tool is None or not tool.is_file():
        pytest.skip("there is no cuobjdump")
    return subprocess.run([str(tool), *options, str(module)], capture_output=True, text=True, check=True).stdout


def test_architectures(module: Path) -> None:
    codes = set(re.findall(r"\.sm_(\d+)\.cubin", dump(module, "--list-elf")))
    intermediate = set(re.findall(r"\.sm_(\d+)\.ptx", dump(module, "--list-ptx")))
    named = [name.replace(".", "") for name in build.ARCHITECTURES]
    assert codes == {name.removesuffix("+PTX") for name in named}
    assert intermediate == {name.removesuffix("+PTX") for name in named if name.endswith("+PTX")}


def test_nothing_is_spilled(module: Path) -> None:
    usage = re.findall(r"Function (\w+):\n *(.*)", dump(module, "--dump-resource-usage"))
    assert len(usage) == KERNELS * len(build.ARCHITECTURES)
    for name, used in usage:
        numbers = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
        assert numbers["STACK"] == numbers["LOCAL"] == 0 and numbers["REG"] <= MOST_REGISTERS, (name, used)


@pytest.fixture(scope="module")
def functions(module: Path) -> dict[str, str]:
    """Kernel -> its instructions on Hopper."""
    code = dump(module, "--dump-sass", "--gpu-architecture", "sm_90")
    return dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\t*\.{5}|\Z)", code, re.DOTALL))


def vectors_of(name: str) -> int:
    """How many of each operand a thread of a Gaussian kernel has under way."""
    if "on_chip" not in name:
        return 4
    return int(re.findall(r"Li(\d+)E", name)[0]) // (8 if "Half" in name or "BFloat16" in name else 4)


def accesses(body: str, bits: int) -> tuple[int, int]:
    loads, stores = (len(re.findall(rf"\b{kind}\.E\.{bits}\b", body)) for kind in ("LDG", "STG"))
    return loads, stores


def test_vectors_are_read_and_written_in_16_bytes(functions: dict[str, str]) -> None:
    seen = 0
    for name, body in functions.items():
        assert not re.search(r"\b(?:LDL|STL)\b", body), name
        if "gaussian" not in name or "Mixed" in name:
            continue
        seen += 1
        (loads, stores), vectors = accesses(body, 128), vectors_of(name)
        assert loads >= 2 * vectors and (stores >= vectors or "sums" in name), (name, loads, stores)
    assert seen == 36


def test_groups_of_any_dtypes_are_read_and_written_at_once(functions: dict[str, str]) -> None:
    seen = 0
    for name, body in functions.items():
        if "Mixed" not in name:
            continue
        seen += 1
        vectors = vectors_of(name)
        for bits in (64, 128):  # of two or four bytes an element
            loads, stores = accesses(body, bits)
            assert loads >= 2 * vectors and (stores >= vectors or "sums" in name), (name, bits, loads, stores)
        # Those of pred and target are under way together: before any is widened, none waits.
        together = [[accesses(run, bits)[0] for bits in (64, 128)] for run in re.split(r"\b(?:HADD2|FADD)\b", body)]
        assert max(map(min, together)) >= 2 * min(vectors, 4), (name, together)
    assert seen == 6


def test_it_loads_without_a_driver_and_says_so(module: Path) -> None:
    script = f"""
import torch
from fdu_kernels import build
from pathlib import Path
module = build._import_file(Path({str(module)!r}))
print(module.cuda_why_unusable(0))
ones, zeros, value, grad = torch.ones(2, 3), torch.zeros(2, 3), torch.empty(()), torch.empty(2, 3)
module.gaussian(ones, zeros, 1.0, 0.0, 64.0, None, 1.0, None, None, True, 1, 1.0, value, None, grad)
assert value == 1
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert torch.cuda.is_available() or ran.stdout.startswith("fdu_kernels: cudaSetDevice: ")
