"""Which variant of the kernel that holds samples on chip is the fastest: ``python benchmarks/gpu_probe.py probe``.

Compiles probe.cu with nvcc, runs it, and makes a row of each line that it prints: elements of a sample, elements per
thread, threads per block, blocks per cluster, and whether blocks come to their barriers before ("early") or after they
store the gradient ("late"), or early in clusters that fetch their next sample meanwhile ("ahead"). ``share`` is the
share of the bandwidth of a copy. With ``--rehearsal`` it runs on the CPU, at toy size, by the tests' emulation.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import records
from competitors import CLONE_PASSES, FORMS
from records import Row, Rows

from fdu_kernels import build

PROGRAM = records.HERE / "probe.cu"
SIZES = (16_384, 65_536, 262_144)
MEGABYTES, ROUNDS = 512, 8
TOY_SIZES, TOY_MEGABYTES, TOY_ROUNDS = (4096,), 0.0625, 1


def command(rehearsal: bool, program: Path) -> list[str]:
    """How to compile it; BuildError where that is impossible."""
    if rehearsal:
        import emulated_cuda  # of the tests

        plan = build.recipe()
        compiler, flags = emulated_cuda.flags_of(plan)
        return [compiler, *flags, str(PROGRAM), "-o", str(program)]
    plan = build.recipe(build.architectures_of_devices())
    if not plan.architectures:
        raise build.BuildError(plan.cuda)
    compiler, _, flags = plan.objects["cuda.o"]
    return [compiler, *flags, "-I", str(plan.sources), str(PROGRAM), "-o", str(program)]


def output_of(*words: str) -> str:
    """What a program prints; BuildError with its complaint if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise build.BuildError(f"{words[0]} failed: {(done.stderr + done.stdout).strip()[-300:]}")
    return done.stdout


def probe(rows: Rows) -> None:
    """A row per variant; one that computes something wrong has an error."""
    megabytes, rounds, sizes = (TOY_MEGABYTES, TOY_ROUNDS, TOY_SIZES) if rows.rehearsal else (MEGABYTES, ROUNDS, SIZES)
    found: list[Row] = []

    def compiled_and_run() -> Row:
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "probe"
            output_of(*command(rows.rehearsal, program))
            printed = output_of(str(program), str(megabytes), str(rounds), *map(str, sizes))
        copy, *variants = map(json.loads, printed.splitlines())
        found.extend(variants)
        return copy

    rows.add({"variant": "copy"}, compiled_and_run)
    for row in found:
        rows.add(row, lambda row=row: figures(row, rows.rows[0]["copy_us"]), least=0.0)


def figures(row: Row, copy_us: float) -> Row:
    """The share of the copy bandwidth of a variant."""
    if not row.pop("right"):
        raise ArithmeticError("loss or gradient are wrong")
    return {"share": FORMS["gaussian"].passes / CLONE_PASSES * copy_us / row["us"]}


SECTIONS = {"probe": probe}

if __name__ == "__main__":
    records.run_section(SECTIONS)
