"""The compiled CUDA kernels without a GPU: architectures, registers, accesses, hot loops, loading without one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import bench_compiled
import compiled
import pytest
import torch
from compiled import LOAD, STORE, Code

from fdu_kernels import build

# The three architectures take some minutes, once; afterwards they are in the cache. So is what `make wheel` built.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
MOST_REGISTERS = 128
KERNELS = 66
"""Of one architecture: of the Gaussian losses 36 for vectors of one dtype, 6 for clusters with shared memory and 6 for
all pairs; of expectations 12 for vectors of one dtype and 6 for all."""


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
    try:
        return compiled.dump(module, *options)
    except FileNotFoundError as error:
        pytest.skip(str(error))


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
def codes(module: Path) -> dict[str, list[Code]]:
    """The kernels by architecture."""
    dump(module, "--list-elf")
    return {gpu: compiled.code_of(module, gpu) for gpu in bench_compiled.NVIDIA}


@pytest.fixture(scope="module")
def functions(codes: dict[str, list[Code]]) -> dict[str, str]:
    """Kernel -> its instructions on Hopper."""
    return {code.name: "\n".join(code.instructions) for code in codes["sm_90"]}


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
        if "gaussian" not in name or "in_clusters" in name or "Mixed" in name:
            continue
        seen += 1
        (loads, stores), vectors = accesses(body, 128), vectors_of(name)
        assert loads >= 2 * vectors and (stores >= vectors or "sums" in name), (name, loads, stores)
    assert seen == 36


def test_expectations_of_one_dtype_are_read_and_written_in_16_bytes(functions: dict[str, str]) -> None:
    seen = 0
    for name, body in functions.items():
        if "expectation" not in name or "Mixed" in name:
            continue
        seen += 1
        # A batch, and the one that follows it.
        loads, stores = accesses(body, 128)
        assert loads >= 4 and stores >= (2 if "Lb1E" in name else 0), (name, loads, stores)
    assert seen == 12


MOST_INSTRUCTIONS = {
    "variational, jensen_shannon": 30, "variational, kl": 28,
    "density ratio, jensen_shannon": 64, "density ratio, kl": 37,
    "Gaussian, on chip": 14, "Gaussian, clusters in turns": 12, "Gaussian, largest clusters": 12,
    "Gaussian, two passes: distance": 10, "Gaussian, two passes: gradient": 11,
}  # fmt: skip
"""Per element in a hot loop, on every architecture and for every dtype."""


@pytest.mark.parametrize("gpu", bench_compiled.NVIDIA)
def test_hot_loops_are_short(codes: dict[str, list[Code]], gpu: str) -> None:
    rows = list(bench_compiled.cuda_rows({gpu: codes[gpu]}))
    left_out = "clusters" if gpu == bench_compiled.WITHOUT_CLUSTERS else "none"
    assert {row["loop"] for row in rows} == {name for name in MOST_INSTRUCTIONS if left_out not in name}
    for row in rows:
        assert 3 < row["instructions"] <= MOST_INSTRUCTIONS[row["loop"]], row
        assert row["special"] <= (3 if row["loop"].startswith("variational") else 5), row


@pytest.mark.parametrize("gpu", bench_compiled.NVIDIA)
def test_blocks_arrive_before_they_store(codes: dict[str, list[Code]], gpu: str) -> None:
    """No arrival, at the ticket or at the cluster's barrier, comes after a store of the gradient."""
    seen = 0
    for code in codes[gpu]:
        if "on_chip" not in code.name or "Mixed" in code.name:
            continue
        seen += 1
        ticket, barrier = r"ATOMG?\.\S*INC", r"UCGABAR_ARV"
        for arrival, times in ((ticket, 1), (barrier, 0 if gpu == "sm_80" else 2)):
            assert sum(bool(re.search(arrival, text)) for text in code.instructions) == times, (code.name, arrival)
            assert not [text for text in code.after(STORE) if re.search(arrival, text)], (code.name, arrival)
        # Nor does a fence, unless the block is the last of all.
        way, vectors = code.through(), vectors_of(code.name)
        stores = [at for at, text in enumerate(way) if re.search(STORE, text)]
        assert len(stores) == vectors and sum(bool(re.search(LOAD, text)) for text in way) >= 2 * vectors, code.name
        assert not [text for text in way[stores[0] :] if "MEMBAR" in text], code.name
    assert seen == 24


@pytest.mark.parametrize("gpu", [gpu for gpu in bench_compiled.NVIDIA if gpu != bench_compiled.WITHOUT_CLUSTERS])
def test_clusters_fetch_before_they_store(codes: dict[str, list[Code]], gpu: str) -> None:
    """Three quarters of the next sample, in bulk; and no block comes to a barrier late."""
    seen = 0
    for code in codes[gpu]:
        if "in_clusters" not in code.name:
            continue
        seen += 1
        in_turns, lanes = "Lb1E" in code.name, 4 if "5Float" in code.name else 8
        stores = (64 if in_turns else 128) // lanes
        loads = 2 * stores // 4 if in_turns else 2 * stores
        bulk, ticket, barrier = r"UBLKCP", r"ATOMG?\.\S*INC", r"UCGABAR_ARV"
        for pattern, times in (
            (LOAD, loads), (STORE, stores), (bulk, 4 if in_turns else 0), (ticket, 1), (barrier, 2),
        ):  # fmt: skip
            assert sum(bool(re.search(pattern, text)) for text in code.instructions) == times, (code.name, pattern)
        for arrival in (ticket, barrier, bulk):
            late = [text for text in code.after(STORE, once=True) if re.search(arrival, text)]
            assert not late, (code.name, arrival)
    assert seen == 6


def test_sums_have_eight_loads_under_way(functions: dict[str, str]) -> None:
    """Of what other blocks left: a load of these takes as long as hundreds of instructions."""
    for name, body in functions.items():
        if "gradient" not in name:
            runs = re.split(r"\bDADD\b", body)
            assert max(len(re.findall(r"\bLDG\.E\.64\.STRONG\.GPU\b", run)) for run in runs) >= 8, name


def test_groups_of_any_dtypes_are_read_and_written_at_once(functions: dict[str, str]) -> None:
    seen = 0
    for name, body in functions.items():
        if "gaussian" not in name or "Mixed" not in name:
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
module.gaussian(ones, zeros, 1.0, 0.0, 64.0, None, 1.0, None, None, True, 1, 1.0, value, None, grad, None)
assert value == 1
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert torch.cuda.is_available() or ran.stdout.startswith("fdu_kernels: cudaSetDevice: ")
