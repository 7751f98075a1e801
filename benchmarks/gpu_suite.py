"""Build, test and time everything on a GPU machine in one command: ``python benchmarks/gpu_suite.py --out DIR``.

Needs torch, triton, numpy, pytest and a C++ compiler, and nvcc for the CUDA kernels. The trainings also need diffusers,
transformers, peft and accelerate; what gpu_wheels.txt names may come as wheels (--wheels). With pytest-xdist the tests
use several cores. Nothing is installed. Every section is a process with a time limit, and what fails in one costs no
other. DIR/gpu_suite.json collects all results; as benchmarks/results/gpu-NAME.json it appears in docs/performance.md.
DIR/logs.tar.gz holds the logs. Both are written after every section. A section that measures writes its rows into
DIR/SECTION.json as they come. They move into the record when it ends, so a run that is cut off keeps them. Where there
is no git, FDU_COMMIT names the commit.

``--rehearsal`` runs the sections at toy size on the CPU: it interprets Triton's kernels, builds those of CUDA with
nvcc, and emulates them. ``--only`` picks sections.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))  # nothing has to be installed

import promises  # noqa: E402
import records  # noqa: E402

from fdu.storage.output import whole_file, write_json  # noqa: E402
from fdu_kernels.build import cache_folder  # noqa: E402

RECORD, LOGS = "gpu_suite.json", "logs.tar.gz"
SANITIZED = (
    "golden and le_cam or value_and_gradient and hellinger and 33 or strides and mixed and 5 "
    "or clusters_and_tickets and (262144 or 300001) or cuda and shared_memory and float32 and (40000 or 1000000)"
)
"""One of each: tables and critics, one block per sample with any alignment, mixed layouts with a mask, clusters,
samples of several blocks. Compute-sanitizer makes everything many times slower."""
RACED = "cuda and (clusters_and_tickets or shared_memory and float32 and (40000 or 1000000))"
"""The kernels whose blocks meet in shared memory or count who comes last."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 6.0
"""Seconds after its limit in which an interrupted section may end by itself."""
SHORTEST = 5.0
"""No section starts with less time."""
TAIL = 20
"""Lines of a log in the record."""
WORKERS = 6
"""Parallel test processes: most of the time goes into compiling Triton's kernels, on the host."""
REHEARSED = "9.0"
"""The architecture that a rehearsal builds CUDA kernels for."""
ON_A_GPU = ("memcheck", "racecheck", "compiled")
"""Sections that a rehearsal leaves out."""
PATHS = (ROOT, ROOT / "tests" / "gpu", ROOT / "tests" / "fdu_kernels")
"""What the sections import from."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the suite."""

    name: str
    seconds: float
    """Time limit. A section may also use what earlier ones left over."""
    command: tuple[str, ...]
    """Empty if its program is not installed."""
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    least: float = SHORTEST
    """Seconds that must be left for it."""
    measures: bool = False
    """Whether it writes rows and takes the options of records.run_section."""


def sections(rehearsal: bool, site: Path = Path("site"), wheels: Path | None = None) -> list[Section]:
    """All sections in order, correctness before speed; together they take less than nine minutes.

    Args:
        site: where wheels are unpacked to.
        wheels: the folder that they lie in.
    """
    # Not with the options in pyproject.toml: the machine may have another pytest, and lack its plugins.
    options = f"-c {os.devnull} --rootdir . -q --tb=short --maxfail=15 -p no:cacheprovider --import-mode=importlib"
    pytest = (sys.executable, "-m", "pytest", *options.split())
    parallel = ("-p", "xdist.plugin", "-n", str(WORKERS)) if importlib.util.find_spec("xdist") else ()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    # Other plugins cost their import, and may need what is not installed.
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    rehearsed = {**plain, "FDU_REHEARSAL": "1"} if rehearsal else plain

    def tested(name: str, seconds: float, tests: str, *chosen: str, **environment: str) -> Section:
        command = (*pytest, *(() if rehearsal else parallel), f"tests/gpu/{tests}", *chosen)
        return Section(name, seconds, command, {**rehearsed, **environment})

    def sanitized(tool: str, seconds: float, chosen: str, *more: str) -> Section:
        # torch expects and handles some errors of the API; under the tool Python takes long to start.
        checks = ("--tool", tool, "--error-exitcode", "9", "--launch-timeout", "120", *more)
        command = (sanitizer, *checks, *pytest, "tests/gpu/test_gpu.py", "-k", chosen) if sanitizer else ()
        # Behind torch's cache the sanitizer would see large blocks and not their tensors.
        return Section(tool, seconds, command, {**plain, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    def measured(script: str, name: str, seconds: float, least: float = SHORTEST) -> Section:
        command = (sys.executable, str(HERE / script), name, *(["--rehearsal"] if rehearsal else []))
        interpreted = {"TRITON_INTERPRET": "1"} if rehearsal and name in ("latents", "host") else {}
        return Section(name, seconds, command, interpreted, least, measures=True)

    carried = ("--wheels", str(wheels)) if wheels else ()
    found = [
        Section("build", 60, (sys.executable, "-m", "fdu_kernels.build", *([REHEARSED] if rehearsal else []))),
        Section("wheels", 15, (sys.executable, str(HERE / "gpu_wheels.py"), "--into", str(site), *carried)),
        measured("gpu_losses.py", "machine", 8),
        tested("cuda", 35, "test_gpu.py", "-k", "cuda"),
        tested("triton", 60, "test_gpu.py", "-k", "triton", **({"TRITON_INTERPRET": "1"} if rehearsal else {})),
        tested("fdu", 60, "test_gpu_training.py"),
        measured("gpu_losses.py", "large", 80),
        measured("gpu_losses.py", "latents", 65),
        measured("gpu_training.py", "sd15", 45),
        measured("gpu_probe.py", "probe", 20),
        measured("gpu_losses.py", "host", 10),
        measured("gpu_losses.py", "sweep", 12),
        sanitized("memcheck", 30, SANITIZED, "--report-api-errors", "no"),
        sanitized("racecheck", 20, RACED),
        measured("gpu_training.py", "sdxl", 14),
        measured("gpu_training.py", "compiled", 0, least=150),
    ]
    return [section for section in found if not rehearsal or section.name not in ON_A_GPU]


def run(section: Section, rows: Path, log: Path, limit: float, site: Path = Path()) -> dict[str, Any]:
    """Run a section's process; when its time is over, interrupt it and then kill whatever it started."""
    began = time.monotonic()
    options = ("--rows", str(rows), "--until", str(time.time() + limit)) if section.measures else ()
    paths = os.pathsep.join(filter(None, [*map(str, (*PATHS, site)), os.environ.get("PYTHONPATH")]))
    with log.open("w") as stream:
        process = subprocess.Popen(
            (*section.command, *options), cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths, **section.environment},
        )  # fmt: skip
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(limit)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
    finally:
        end_session(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)  # a process that is stuck in the driver does not end
    code = -signal.SIGKILL if process.returncode is None else process.returncode
    lines = log.read_text(errors="replace").splitlines()
    tail = [] if section.measures and code == 0 else lines[-TAIL:]
    return {"exit": code, "tail": tail, "seconds": round(time.monotonic() - began, 1)}


def end_session(session: int) -> None:
    """Kill all processes of a session: ninja's compilers have process groups of their own."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        # The process may have ended meanwhile. Its name, in brackets, may hold spaces.
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[3]) == session:
                os.kill(int(path.parent.name), signal.SIGKILL)


def pack(logs: Path, path: Path, builds: bool) -> None:
    """Pack the logs so far, also those of the last builds if wanted. What cannot be packed does not end the suite."""
    try:
        found = [*cache_folder().glob("*/failure.txt"), *cache_folder().glob("*/build/build.log")] if builds else []
        for log in sorted(found, key=lambda log: log.stat().st_mtime)[-4:]:  # a build without nvcc follows a failed one
            shutil.copyfile(log, logs / f"build-{log.relative_to(cache_folder()).parts[0]}-{log.name}")
        with whole_file(path) as fresh:
            shutil.make_archive(str(fresh).removesuffix(".tar.gz"), "gztar", logs)
    except OSError as error:
        print(f"not all logs are kept: {error}", flush=True)


def succeeded(section: Section, result: dict[str, Any]) -> bool:
    """Whether a section ended well. A build needs CUDA kernels. A section for which no time is planned, or without its
    program, may be skipped."""
    if "skipped" in result:
        return not section.command or not section.seconds
    built = re.search(r"^architectures: \S", "\n".join(result["tail"]), re.M)
    if section.name == "build" and not built:
        return False
    return result["exit"] == 0 and result.get("complete", not section.measures)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the record and the logs")
    parser.add_argument(
        "--wheels", type=Path, help="the folder of the wheels that gpu_wheels.txt names (default: none)"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit (default: %(default)s)")
    parser.add_argument("--rehearsal", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections (default: all)")
    options = parser.parse_args()
    options.out = options.out.resolve()  # sections run in another folder
    options.wheels = options.wheels and options.wheels.resolve()
    names = [section.name for section in sections(options.rehearsal)]
    unknown = set(options.only or ()) - set(names)
    if unknown:
        parser.error(f"--only names no section: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return options


def run_all(wanted: list[Section], out: Path, logs: Path, site: Path, deadline: float, record: dict[str, Any]) -> None:
    """Run the sections; write record and logs after each."""
    for number, section in enumerate(wanted):
        rows = out / f"{section.name}.json"
        left = deadline - time.monotonic() - GRACE
        limit = min(left, max(section.seconds, left - sum(later.seconds for later in wanted[number + 1 :])))
        rows.unlink(missing_ok=True)  # of an earlier run
        result: dict[str, Any] = {"exit": -signal.SIGINT, "tail": []}  # if it is interrupted
        try:
            if not section.command:
                result = {"skipped": "its program is not installed"}
            elif limit < section.least:
                result = {"skipped": "no time left"}
            else:
                result = run(section, rows, logs / f"{section.name}.log", limit, site)
        finally:
            record[section.name] = result = {**result, **records.read(rows)}
            write_json(out / RECORD, record)
            rows.unlink(missing_ok=True)
            pack(logs, out / LOGS, builds=section.name == "build")
        if not succeeded(section, result):
            print(*result.get("tail", ()), sep="\n")
        outcome = result.get("skipped") or f"exit code {result['exit']}, {result['seconds']} s"
        print(f"{section.name}: {outcome}", flush=True)


def interrupt(*_: Any) -> None:
    """End the section and the suite. Another signal does not disturb the last writes."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run the sections; 0 if all succeeded, 130 after an interrupt."""
    options = arguments()
    deadline = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    for number in SIGNALS:  # also in a shell's background, where SIGINT would be ignored
        signal.signal(number, interrupt)
    record: dict[str, Any] = {"rehearsal": True} if options.rehearsal else {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        logs, site = Path(folder) / "logs", Path(folder) / "site"
        logs.mkdir()
        found = sections(options.rehearsal, site, options.wheels)
        wanted = [section for section in found if not options.only or section.name in options.only]
        try:
            run_all(wanted, options.out, logs, site, deadline, record)
        except KeyboardInterrupt:
            record["interrupted"] = True
            write_json(options.out / RECORD, record)
    results = [(section, record.get(section.name, {"skipped": "interrupted"})) for section in wanted]
    incomplete = [section.name for section, result in results if not succeeded(section, result)]
    if options.rehearsal:
        print("A rehearsal: its figures mean nothing.")
    else:
        promises.judge(promises.gpu(record))
    left = f"{deadline - time.monotonic():.0f} s left"
    print(f"incomplete: {', '.join(incomplete) or 'none'}; {left}; {options.out / RECORD}")
    return 130 if "interrupted" in record else int(bool(incomplete))


if __name__ == "__main__":
    sys.exit(main())
