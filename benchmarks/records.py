"""Records of measurements: one file per machine, with a part per suite, and what a part says about the machine.

``make bench`` writes results/cpu.json. The record of gpu_suite.py goes beside it as results/gpu*.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fdu.storage.fingerprint import versions
from fdu.storage.output import write_json
from fdu_kernels.build import NVCC

HERE = Path(__file__).parent
RECORD = HERE / "results" / "cpu.json"
Row = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A record; {} if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def keep(path: Path, suite: str, **part: Any) -> None:
    """Write a suite's part into a record, and leave the other parts as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**read(path), suite: {**machine(), **part}})


def machine() -> dict[str, Any]:
    """Device, versions, commit and date of a measurement; on a GPU also its driver, CUDA and sizes."""
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    device, gpu = f"CPU ({cpu_name()}, {os.cpu_count()} cores, {threads} threads, {capability})", {}
    if torch.cuda.is_available():
        device, gpu = f"{torch.cuda.get_device_name()}; {device}", describe_gpu()
    head = output_of("git", "rev-parse", "HEAD")
    return {
        "device": device,
        **gpu,
        "versions": {**versions(), "torch": torch.__version__},  # names the CUDA that it was built for
        "commit": os.environ.get("FDU_COMMIT") or head,
        "changed": bool(head and output_of("git", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.date.today().isoformat(),
    }


def describe_gpu() -> Row:
    """Driver, CUDA and sizes of the GPU. Inputs that exceed its L2 cache are cold."""
    of = torch.cuda.get_device_properties(0)
    return {
        "driver": output_of("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "nvcc": next(filter(None, (output_of(name, "--version") for name in NVCC)), "").rpartition("\n")[2],
        "l2_bytes": of.L2_cache_size,
        "memory_bytes": of.total_memory,
        "multiprocessors": of.multi_processor_count,
    }


def cpu_name() -> str:
    """The processor's name in Linux; elsewhere its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def output_of(*command: str) -> str:
    """What a program prints; "" where it is not installed or fails."""
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


@dataclasses.dataclass
class Rows:
    """The rows of a section of the GPU suite, written as they come. A row that fails costs no other row."""

    write: Callable[[Any], object]
    """Writes the section's result so far."""
    until: float
    """No row begins that may end later, by time.time()."""
    rehearsal: bool = False
    rows: list[Row] = dataclasses.field(default_factory=list)
    left_out: list[Row] = dataclasses.field(default_factory=list)
    longest: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds of the longest row so far, by kind."""

    @property
    def device(self) -> str:
        """Where to measure."""
        return "cpu" if self.rehearsal else "cuda"

    def add(self, row: Row, measure: Callable[[], Row], least: float = 3.0, kind: str = "") -> None:
        """Measure a row and keep it with its figures or its error.

        Args:
            least: seconds that must be left, and somewhat more than the longest row of its kind took.
        """
        if self.leaves_out(row, least, kind):
            return
        began = time.time()
        self.rows.append(row)
        try:
            row.update(measure())
        except Exception as error:  # out of memory, or what does not run on this device
            row["error"] = f"{type(error).__name__}: {error}"[:400]
        self.longest[kind] = max(self.longest.get(kind, 0.0), time.time() - began)
        self.keep(False)

    def leaves_out(self, row: Row, least: float = 3.0, kind: str = "") -> bool:
        """Whether too little time is left for a row; if so, note that."""
        wanted = max(0.0 if self.rehearsal else least, 1.2 * self.longest.get(kind, 0.0))
        if self.until - time.time() >= wanted:
            return False
        self.left_out.append(row)
        self.keep(False)
        return True

    def keep(self, complete: bool = True) -> None:
        """Write the rows so far."""
        self.write({"complete": complete and not self.left_out, "left_out": self.left_out, "rows": self.rows})


def run_section(sections: Mapping[str, Callable[[Rows], None]]) -> None:
    """Run the section that the command line names, and print its rows or write them into a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=sections)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="the file to write (default: print at the end)")
    parser.add_argument("--until", type=float, default=time.time() + 60, help="time.time() (default: in 60 seconds)")
    parser.add_argument("--rehearsal", action="store_true", help="toy sizes on the CPU")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # no row begins too late, and the current one may end
    if options.rehearsal:
        torch.set_num_threads(1)  # nothing in it is large enough for two
    rows = Rows(lambda found: options.rows and write_json(options.rows, found), options.until, options.rehearsal)
    sections[options.section](rows)
    rows.keep()
    if not options.rows:
        print(json.dumps(rows.rows, indent=1))
