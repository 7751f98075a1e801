"""Build, test and time everything on a GPU machine in one command: ``python benchmarks/gpu_suite.py --out DIR``.

Needs torch, triton, numpy, pytest and a C++ compiler (nvcc for the CUDA kernels); the training steps also need
diffusers, transformers, peft and accelerate, which PYTHONPATH may name; with pytest-xdist the tests use several cores.
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
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import promises
from gpu_runner import HERE, RECORD, Section, Suite

SANITIZED = " or ".join(
    (
        "golden and le_cam",
        "value_and_gradient and hellinger and 33",
        "strides and mixed and 5",
        "the_same_to and 1000003",
        "peak_memory",
    )
)
"""One of each: tables and critics, one block per sample with any alignment, mixed layouts with a mask, samples of
several blocks, clusters. Compute-sanitizer makes everything many times slower."""
COMPILED = "test_expectation and sm_90-torch.bfloat16"
"""The kernels that a rehearsal compiles for a GPU."""
SLOWER = 5
"""A rehearsal may take so many times the budgets of a run."""
WORKERS = 6
"""Parallel test processes: most of the time goes into compiling Triton's kernels, on the host."""
LAST_LOGS = 4
"""Of builds, with nvcc and, where that failed, without."""
INTERRUPTED = 130


def sections(rehearsal: bool) -> list[Section]:
    """All, in order: what is right before what is fast. Together less than nine minutes; a rehearsal gets more, for a
    busy machine."""
    options = "-q --tb=short --maxfail=15 -o addopts= -p no:cacheprovider --import-mode=importlib"
    pytest = (sys.executable, "-m", "pytest", *options.split())
    xdist = importlib.util.find_spec("xdist") is not None
    parallel = ("-p", "xdist.plugin", "-n", str(1 if rehearsal else WORKERS)) if xdist else ()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    # Errors of the API that torch expects and handles are none; under the tool Python takes long to start.
    checks = ("--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no", "--launch-timeout", "120")
    memcheck = (sanitizer, *checks, *pytest, "tests/gpu", "-k", SANITIZED) if sanitizer else ()
    # Other plugins cost their import, and may bring what an installation lacks.
    plain = (("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1"),)
    # Behind torch's cache the sanitizer would see large blocks and not their tensors.
    uncached = (*plain, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"))
    judged = functools.partial(judge_build, cuda=not rehearsal)

    def measured(script: str, name: str, seconds: float, spare: float = 0.0) -> Section:
        toy = (("TRITON_INTERPRET", "1"), ("FDU_REHEARSAL", "1")) if rehearsal else ()
        return Section(name, seconds, (sys.executable, str(HERE / script), name), True, toy, spare=spare)

    common = [
        Section("build", 80, (sys.executable, "-m", "fdu_kernels.build"), after=judged),
        measured("gpu_machine.py", "machine", 12),
        Section("tests", 80, (*pytest, *parallel, "tests/gpu"), environment=plain),
        measured("gpu_losses.py", "large", 95),
        measured("gpu_losses.py", "latents", 75),
        measured("gpu_training.py", "sd15", 60),
        measured("gpu_losses.py", "host", 12),
        measured("gpu_losses.py", "sweep", 15),
    ]
    sdxl = measured("gpu_training.py", "sdxl", 40)
    if rehearsal:
        codegen = (*pytest, "-x", "tests/fdu_kernels/test_triton_codegen.py", "-k", COMPILED)
        wanted = [*common, sdxl, Section("codegen", 30, codegen)]
        return [dataclasses.replace(one, seconds=SLOWER * one.seconds) for one in wanted]
    compiled = measured("gpu_training.py", "compiled", 0, spare=150)
    return [*common, Section("sanitizer", 60, memcheck, environment=uncached), sdxl, compiled]


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


def arguments() -> tuple[argparse.Namespace, list[Section]]:
    """Of the command line, and the sections that it wants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the record and the logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit (default: %(default)s)")
    parser.add_argument("--rehearsal", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections alone (default: all)")
    options = parser.parse_args()
    wanted = {section.name: section for section in sections(options.rehearsal)}
    unknown = set(options.only or ()) - set(wanted)
    if unknown:
        parser.error(f"--only names no section: {', '.join(sorted(unknown))}; there are {', '.join(wanted)}")
    return options, [section for name, section in wanted.items() if not options.only or name in options.only]


def main() -> int:
    """Run what is wanted; 0 if all of it came to its end."""
    options, wanted = arguments()
    deadline = time.monotonic() + 60 * options.minutes * (SLOWER if options.rehearsal else 1)
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what comes from outside ends the sections as well
    with tempfile.TemporaryDirectory(prefix="gpu_suite-", ignore_cleanup_errors=True) as work:
        suite = Suite(options.out, Path(work), deadline, options.rehearsal)
        if options.rehearsal:
            suite.keep("rehearsal", True)
        try:
            if wanted[0].after:
                suite.begin(wanted[0])  # the build, meanwhile
            seconds = [section.seconds for section in wanted]
            complete = all([suite.run(one, sum(seconds[number + 1 :])) for number, one in enumerate(wanted)])
        except KeyboardInterrupt:
            suite.keep("interrupted", True)
            print("interrupted", flush=True)
            return INTERRUPTED
        finally:
            suite.close()
    if options.rehearsal:
        print("A rehearsal: its figures mean nothing.")
    else:
        promises.judge(list(promises.gpu(suite.record)))
    print(f"{'complete' if complete else 'INCOMPLETE'}; {suite.left():.0f} s left; {options.out / RECORD}")
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
