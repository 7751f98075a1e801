"""Time fdu's training against the published loops: ``python benchmarks/bench_training.py [--check]``.

Every run is a fresh process (training_runs.py). The runs that measure steps take turns, --rounds times, and medians
count; whole jobs, which differ by far more than they vary, are measured once. Writes the record, of which
``make bench-report`` writes docs/training.md, and prints it. Takes ten minutes on two cores; leave the machine alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import promises

from fdu.storage.output import write_json
from fdu.storage.versions import versions

HERE = Path(__file__).parent
RECORD = HERE / "results" / "training" / "cpu.json"
Figures = dict[str, float]


def measure(name: str, threads: int, wrapper: str) -> Figures:
    """One run, in a process of its own."""
    command = [*shlex.split(wrapper), sys.executable, str(HERE / "training_runs.py"), name]
    # Threads that wait sleep: spinning would take the cores from those that compute.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def make_record(rounds: int, threads: int, wrapper: str) -> dict[str, Any]:
    """Run everything."""
    import shapes
    import timing
    import torch
    from training_runs import JOB_SHARE, LATENTS, RUNS

    runs: dict[str, list[Figures]] = {name: [] for name in RUNS}
    for turn in range(rounds):
        for name in RUNS if turn == 0 else [name for name, run in RUNS.items() if not run.job]:
            runs[name].append(measure(name, threads, wrapper))
            print(f"round {turn + 1}, {name}: {runs[name][-1]}", file=sys.stderr)
    return {
        "device": f"{platform.machine()} CPU ({timing.cpu_name()}), {threads} threads",
        "versions": versions(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "job_share": JOB_SHARE,
        "latents": LATENTS,
        "job_latents": RUNS[promises.JOB].config().num_latents,
        "proportions": {"1": shapes.proportions(1, 1, 1), "scaled": shapes.proportions()},
        "runs": runs,
    }


def show(record: dict[str, Any]) -> None:
    """Print device, runs and promises."""
    print(f"{record['device']}, {record['capability']}; medians of {record['rounds']} rounds")
    for name in record["runs"]:
        step, peak = (promises.median(record, name, figure) for figure in ("wall_step", "peak"))
        print(f"  {name:<42}{step:8.2f} s per step{peak:8.0f} MiB at the peak")
    for name in (promises.REFERENCE_JOB, promises.JOB):
        print(f"  {name:<42}{promises.job_seconds(record, name):8.1f} s in all")


def main() -> int:
    """Measure, write and print; 1 if a promise is broken under ``--check``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=RECORD, help="the JSON file to write (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads per run (default: all)")
    parser.add_argument("--wrapper", default="", help="put before each run's command, such as 'taskset -c 0,1'")
    parser.add_argument("--show", action="store_true", help="measure nothing; print the record")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise is broken")
    options = parser.parse_args()
    if not options.show:
        write_json(options.record, make_record(options.rounds, options.threads, options.wrapper))
    record = json.loads(options.record.read_text())
    show(record)
    return promises.judge(list(promises.training(record))) * options.check


if __name__ == "__main__":
    sys.exit(main())
