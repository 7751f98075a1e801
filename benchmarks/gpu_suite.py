"""Build, test and time everything on a GPU machine in one command: ``python benchmarks/gpu_suite.py --out DIR``.

Needs torch, triton, numpy, pytest and a C++ compiler (nvcc for the CUDA kernels); the training steps also diffusers,
transformers, peft and accelerate, which PYTHONPATH may name. Nothing is installed. Every section has a process and a
time budget of its own, so that none can take another's, and writes what it has as it comes: a run that is cut off keeps
all of it. DIR/gpu_suite.json is the record, which belongs in benchmarks/results/gpu/; ``make bench-report`` draws it.

``--rehearsal`` runs every section at toy size on the CPU, the Triton kernels interpreted, and compiles some of them for
a GPU that is not there. ``--only`` picks sections.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
for folder in (str(ROOT), str(ROOT / "benchmarks")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from fdu.output import write_json  # noqa: E402

RECORD = "gpu_suite.json"
SANITIZED = "golden_values and mse or value_and_gradient and hellinger and 33"
COMPILED = "test_expectation and bfloat16-90"
"""The kernels that a rehearsal compiles for a GPU."""
CHILD = "--child"
SLOWER = 5
"""What a rehearsal may take, of a run's budgets."""
GRACE = 6.0
"""Seconds that a section may go on after its deadline, before it is killed."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the suite: a function of a module, in a process forked from this one, or a command."""

    name: str
    seconds: float
    """The most it may take."""
    function: str = ""
    """As "module.name"; it gets a gpu_timing.Plan."""
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def sections(rehearsal: bool) -> list[Section]:
    """All, in order; together less than nine minutes, but for a rehearsal, for which a busy machine may need longer."""
    options = "-q -o addopts= -p no:cacheprovider --import-mode=importlib"
    pytest = (sys.executable, "-m", "pytest", *options.split())
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer") or ""
    memcheck = (sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *pytest, "tests/gpu", "-k", SANITIZED)
    codegen = (*pytest, "-x", "tests/fdu_kernels/test_triton_codegen.py", "-k", COMPILED)
    wanted = [
        Section("build", 90, command=(sys.executable, "-m", "fdu_kernels.build")),
        Section("machine", 15, "gpu_suite.machine"),
        Section("large", 70, "gpu_losses.large"),
        Section("latents", 50, "gpu_losses.latents"),
        Section("sd15", 70, "gpu_training.sd15"),
        Section("host", 12, "gpu_losses.host"),
        Section("sweep", 20, "gpu_losses.sweep"),
        Section("tests", 110, command=(*pytest, "tests/gpu")),
        Section("sdxl", 45, "gpu_training.sdxl"),
    ]
    if rehearsal:
        wanted.append(Section("codegen", 30, command=codegen))
        return [dataclasses.replace(one, seconds=SLOWER * one.seconds) for one in wanted]
    # Behind torch's cache the sanitizer would see large blocks and not their tensors.
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [*wanted, Section("sanitizer", 40, command=memcheck if sanitizer else (), environment=uncached)]


@dataclasses.dataclass
class Suite:
    """The record of a run, its deadline, and where it goes."""

    out: Path
    deadline: float
    rehearsal: bool = False
    record: dict[str, Any] = dataclasses.field(default_factory=dict)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def keep(self, stage: str, result: Any) -> None:
        """Write a section's result, whole or not at all."""
        self.record[stage] = result
        write_json(self.out / RECORD, self.record)

    def run(self, section: Section, reserved: float = math.inf) -> bool:
        """Run a section; whether it came to its end.

        It may take its budget and what earlier ones saved, but for ``reserved``, the seconds of those that follow.
        """
        left = self.left() - GRACE
        budget = min(max(section.seconds, left - reserved), left)
        if budget < (1 if self.rehearsal else 5):
            self.keep(section.name, {"skipped": "no time left"})
        elif section.function:
            self._call(section, budget)
        elif section.command:
            self._command(section, budget)
        else:
            self.keep(section.name, {"skipped": "its program is not installed"})
        result = self.record[section.name]
        succeeded = result.get("exit", 0) == 0 and result.get("complete", True) and "skipped" not in result
        print(f"{section.name}: {'done' if succeeded else 'NOT COMPLETE'}, {result.get('seconds', 0)} s", flush=True)
        for line in result.get("tail", [])[-2:]:
            print(f"  {line}", flush=True)
        return succeeded

    def _call(self, section: Section, budget: float) -> None:
        """In a forked process, which has what is imported here already and a GPU of its own."""
        part, log = self.out / f"{section.name}.json", self.out / f"{section.name}.log"
        part.unlink(missing_ok=True)
        began = time.monotonic()
        process = multiprocessing.get_context("fork").Process(
            target=_in_child, args=(section.function, part, log, began + budget, self.rehearsal)
        )
        process.start()
        process.join(budget + GRACE)
        ended = not process.is_alive()
        if not ended:
            process.kill()
            process.join()
        result = json.loads(part.read_text()) if part.exists() else {"complete": False}
        if not ended:
            result.update(complete=False, killed=True)
        if process.exitcode:
            result.update(complete=False, exit=process.exitcode, tail=_tail(log))
        self.keep(section.name, {**result, "seconds": round(time.monotonic() - began, 1)})

    def _command(self, section: Section, budget: float) -> None:
        """A command in a process group of its own, which ends with it."""
        log = self.out / f"{section.name}.log"
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, **dict(section.environment)}
        environment.pop("TRITON_INTERPRET", None)
        began = time.monotonic()
        with log.open("w") as stream:
            process = subprocess.Popen(
                section.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(budget)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        self.keep(section.name, {"exit": code, "seconds": round(time.monotonic() - began, 1), "tail": _tail(log)})


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-8:]


def _in_child(function: str, part: Path, log: Path, deadline: float, rehearsal: bool) -> None:
    """The forked process: everything printed goes into the log."""
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import torch

    if getattr(torch._C, "_cuda_isInBadFork", bool)():
        # Something imported has looked at the GPU before the fork: a new process, which imports everything anew.
        os.execv(sys.executable, [sys.executable, __file__, CHILD, function, str(part), str(log), str(deadline)])
    _measure(function, part, deadline, rehearsal)


def _measure(function: str, part: Path, deadline: float, rehearsal: bool) -> None:
    import torch
    from gpu_timing import Plan

    if rehearsal:
        torch.set_num_threads(1)  # nothing in it is large enough for two
    module, _, name = function.rpartition(".")
    try:
        found = globals()[name] if module == "gpu_suite" else getattr(importlib.import_module(module), name)
        found(Plan(deadline, lambda result: write_json(part, result), rehearsal))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Without the parent's finalizers, which are not this process's to run.
    sys.stdout.flush()
    os._exit(0)


def machine(plan: Any) -> None:
    """Device, driver, versions, commit."""
    import torch

    import fdu_kernels as fk

    described: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": _output(["git", "rev-parse", "HEAD"]),
        "changed": bool(_output(["git", "status", "--porcelain", "--untracked-files=no"])),
        "date": time.strftime("%Y-%m-%d"),
        "nvcc": _output(["nvcc", "--version"]).splitlines()[-1:],
        "driver": _output(["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.mem", "--format=csv,noheader"]),
        "backends": fk.backends(),
    }
    for package in ("triton", "diffusers", "transformers", "peft", "accelerate"):
        try:
            described[package] = importlib.import_module(package).__version__
        except ImportError:
            described[package] = None
    described["device"] = "CPU, rehearsal"
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described["device"] = properties.name
        described["multiprocessors"] = properties.multi_processor_count
        described["l2_bytes"] = properties.L2_cache_size
        described["memory_bytes"] = properties.total_memory
    plan.keep(described)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def preload() -> None:
    """What the sections import, once for all of them."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that whoever asks for a GPU does not wake it before the fork
    for name in ("torch", "triton", "gpu_losses", "gpu_training"):
        try:
            importlib.import_module(name)
        except ImportError as error:  # the sections that need it will say so
            print(f"{name}: {error}", file=sys.stderr)


def summary(record: dict[str, Any]) -> str:
    """The promises, one a line."""
    from gpu_bounds import bounds

    if record.get("rehearsal"):
        return "A rehearsal: its figures mean nothing."
    lines = []
    for bound in bounds(record):
        value = "no figure" if bound.value is None else f"{bound.value:.3g}"
        lines.append(f"{bound.verdict:>5}  {bound.what} {value} ({bound.sense} {bound.bound:g})  {bound.note}")
    return "\n".join(lines)


def main() -> int:
    """Run the sections in order; 0 if all came to their end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the record and the logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="when to stop, at the latest")
    parser.add_argument("--rehearsal", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections alone")
    options = parser.parse_args()
    wanted = sections(options.rehearsal)
    unknown = set(options.only or ()) - {section.name for section in wanted}
    if unknown:
        parser.error(
            f"--only names no section: {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in wanted)}"
        )
    seconds = 60 * options.minutes * (SLOWER if options.rehearsal else 1)
    suite = Suite(options.out, time.monotonic() + seconds, options.rehearsal)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported
        suite.keep("rehearsal", True)
    preload()
    wanted = [section for section in wanted if not options.only or section.name in options.only]
    outcomes = [
        suite.run(section, sum(later.seconds for later in wanted[number + 1 :]))
        for number, section in enumerate(wanted)
    ]
    print(summary(suite.record))
    print(f"{'complete' if all(outcomes) else 'INCOMPLETE'}; {suite.left():.0f} s left; {options.out / RECORD}")
    return int(not all(outcomes))


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        _, _, function, part, _, deadline = sys.argv
        _measure(function, Path(part), float(deadline), rehearsal=False)
    sys.exit(main())
