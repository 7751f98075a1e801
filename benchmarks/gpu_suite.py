"""Build, test and time everything on a GPU machine in one command: ``python benchmarks/gpu_suite.py --out DIR``.

Needs torch, triton, numpy, pytest and a C++ compiler (nvcc for the CUDA kernels); the training steps also diffusers,
transformers, peft and accelerate, which PYTHONPATH may name; with pytest-xdist the tests take turns on several cores.
Nothing is installed. Every section has a process and a time budget of its own, so that none can take another's, and
writes what it has as it comes: a run that is cut off keeps all of it. DIR/gpu_suite.json is the record, which belongs
in benchmarks/results/gpu/; ``make bench-report`` draws it. DIR/logs.tar.gz holds what the sections printed, and the
logs of builds. Where there is no git, FDU_COMMIT names the commit.

``--rehearsal`` runs every section at toy size on the CPU, the Triton kernels interpreted, and compiles some of them for
a GPU that is not there. ``--only`` picks sections.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_runner import RECORD, ROOT, Section, Suite

SANITIZED = " or ".join(
    (
        "golden and le_cam",
        "value_and_gradient and hellinger and 33",
        "strides and mixed and 5",
        "the_same_to and 1000003",
        "peak_memory",
    )
)
"""One of each: tables and critics, a block a sample that begins anywhere, mixed layouts with a mask, samples of several
blocks, clusters. Compute-sanitizer makes everything many times slower."""
COMPILED = "test_expectation and sm_90-torch.bfloat16"
"""The kernels that a rehearsal compiles for a GPU."""
SLOWER = 5
"""What a rehearsal may take, of a run's budgets."""
WORKERS = 6
"""Processes that test at once: most of the time goes into compiling Triton's kernels, on the host."""
LAST_LOGS = 4
"""Of builds, with nvcc and, where that failed, without."""
INTERRUPTED = 130


def sections(rehearsal: bool) -> list[Section]:
    """All, in order: what is right before what is fast. Together less than nine minutes, but for a rehearsal, for which
    a busy machine may need longer."""
    options = "-q --tb=short --maxfail=15 -o addopts= -p no:cacheprovider --import-mode=importlib"
    pytest = (sys.executable, "-m", "pytest", *options.split())
    parallel = ("-p", "xdist.plugin", "-n", str(2 if rehearsal else WORKERS)) if _installed("xdist") else ()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer") or ""
    # Errors of the API that torch expects and handles are none; under the tool Python takes long to start.
    checks = ("--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no", "--launch-timeout", "120")
    memcheck = (sanitizer, *checks, *pytest, "tests/gpu", "-k", SANITIZED)
    codegen = (*pytest, "-x", "tests/fdu_kernels/test_triton_codegen.py", "-k", COMPILED)
    # Other plugins cost their import, and may bring what an installation lacks.
    plain = (("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"),)
    # Behind torch's cache the sanitizer would see large blocks and not their tensors.
    uncached = (*plain, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"))
    judged = functools.partial(judge_build, cuda=not rehearsal)
    wanted = [
        Section("build", 80, command=(sys.executable, "-m", "fdu_kernels.build"), after=judged),
        Section("machine", 12, "gpu_suite.machine"),
        Section("tests", 80, command=(*pytest, *parallel, "tests/gpu"), environment=plain),
        Section("large", 95, "gpu_losses.large"),
        Section("latents", 75, "gpu_losses.latents"),
        Section("sd15", 60, "gpu_training.sd15"),
        Section("host", 12, "gpu_losses.host"),
        Section("sweep", 15, "gpu_losses.sweep"),
        Section("sanitizer", 60, command=memcheck if sanitizer else (), environment=uncached),
        Section("sdxl", 40, "gpu_training.sdxl"),
        Section("compiled", 0, "gpu_training.compiled", spare=150),
    ]
    if rehearsal:
        wanted = [one for one in wanted if one.name not in ("sanitizer", "compiled")]
        wanted.append(Section("codegen", 30, command=codegen))
        return [dataclasses.replace(one, seconds=SLOWER * one.seconds) for one in wanted]
    return wanted


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def judge_build(logs: Path, cuda: bool) -> str:
    """Take the logs of the last builds from the cache; what is wrong with the one that was made or found, or "".

    Args:
        cuda: whether it has to have CUDA kernels.
    """
    from fdu_kernels.build import cache_folder

    found = [*cache_folder().glob("*/failure.txt"), *cache_folder().glob("*/build/build.log")]
    for path in sorted(found, key=lambda path: path.stat().st_mtime)[-LAST_LOGS:]:
        shutil.copyfile(path, logs / f"build-{path.relative_to(cache_folder()).parts[0]}-{path.name}")
    told = dict(line.partition(": ")[::2] for line in (logs / "build.log").read_text(errors="replace").splitlines())
    if not cuda or told.get("architectures", "").strip():
        return ""
    return f"no CUDA kernels: {told.get('cuda') or 'see the logs'}"


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
        **source(),
        "date": time.strftime("%Y-%m-%d"),
        "nvcc": _output(["nvcc", "--version"]).splitlines()[-1:],
        "driver": _output(["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.mem", "--format=csv,noheader"]),
        "backends": fk.backends(),
    }
    for package in ("triton", "diffusers", "transformers", "peft", "accelerate"):
        try:
            described[package] = importlib.import_module(package).__version__
        except Exception:  # diffusers says by a RuntimeError that it cannot be imported
            described[package] = None
    described["device"] = "CPU, rehearsal"
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described["device"] = properties.name
        described["multiprocessors"] = properties.multi_processor_count
        described["l2_bytes"] = properties.L2_cache_size
        described["memory_bytes"] = properties.total_memory
    plan.keep(described)


def source() -> dict[str, Any]:
    """The commit, and whether files have changed since; None: nobody knows."""
    head = _output(["git", "rev-parse", "HEAD"])
    changed = bool(_output(["git", "status", "--porcelain", "--untracked-files=no"])) if head else None
    return {"commit": os.environ.get("FDU_COMMIT") or head, "changed": changed}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def preload(names: tuple[str, ...] = ("torch", "triton", "gpu_losses", "gpu_training")) -> dict[str, str]:
    """Import what the sections do, once for all of them; what cannot be imported, and why."""
    failures = {}
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # the sections that need it will fail, and only they
            failures[name] = f"{type(error).__name__}: {error}"[:400]
    return failures


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


def run_all(suite: Suite, wanted: list[Section]) -> bool:
    """Run the sections in order; whether all came to their end."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that whoever asks for a GPU does not wake it before the fork
    if wanted[0].command:
        suite.begin(wanted[0])  # the build, meanwhile
    failures = preload()
    if failures:
        suite.keep("not_imported", failures)
        print(f"not imported: {failures}", flush=True)
    outcomes = [
        suite.run(section, sum(later.seconds for later in wanted[number + 1 :]))
        for number, section in enumerate(wanted)
    ]
    return all(outcomes)


def arguments() -> tuple[argparse.Namespace, list[Section]]:
    """Of the command line, and the sections that it wants."""
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
    return options, [section for section in wanted if not options.only or section.name in options.only]


def main() -> int:
    """Run what is wanted; 0 if all of it came to its end."""
    options, wanted = arguments()
    deadline = time.monotonic() + 60 * options.minutes * (SLOWER if options.rehearsal else 1)
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what comes from outside ends the sections as well
    with tempfile.TemporaryDirectory(prefix="gpu_suite-", ignore_cleanup_errors=True) as work:
        suite = Suite(options.out, Path(work), deadline, options.rehearsal)
        if options.rehearsal:
            os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported
            suite.keep("rehearsal", True)
        try:
            complete = run_all(suite, wanted)
        except KeyboardInterrupt:
            suite.keep("interrupted", True)
            print("interrupted", flush=True)
            return INTERRUPTED
        finally:
            suite.close()
    print(summary(suite.record))
    print(f"{'complete' if complete else 'INCOMPLETE'}; {suite.left():.0f} s left; {options.out / RECORD}")
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
