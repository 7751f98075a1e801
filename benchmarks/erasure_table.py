"""Erase every digit and every ink from the embedded pipeline, in every way there is, judge, and write the table.

Run ``python benchmarks/erasure_table.py``.

About four hours of one core, shared by ``--workers`` processes. Every run is one file in ``--results``; a run whose
file is there, with the settings and the pipeline of today, is not made again, so an interrupted call goes on where it
stopped. The tables of ``docs/erasure.md`` are written anew at the end of each call, from whatever runs are there
(``--table_only`` makes none).

Suites: "concepts" (every target, to the superclass and to another class, three seeds for three of them; and one digit
with every divergence), "sigma" (short runs without preservation, where sigma decides whether the divergence matters),
"several" (two concepts at once, and one after the other), "objectives", "variational", "ways" (weightings, timesteps,
gradient surgery, kept outputs) and "methods" (what is trained).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

from erasure_page import write_page
from erasure_runs import BASELINE, AnyRun, before, make, read, record_of, runs

HERE = Path(__file__).parent


def pending(results: Path, suites: list[str] | None = None) -> list[tuple[Callable[..., None], tuple[AnyRun, ...]]]:
    """What still has to be made: the pipeline's own figures first, which every row needs, then the runs."""
    first = [] if read(results / BASELINE) else [(before, ())]
    wanted = [run for run in runs() if not suites or run.suite in suites]
    return [*first, *((make, (run,)) for run in wanted if record_of(results, run) is None)]


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "erasure", help="a folder, a file a run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--suites", nargs="+", help="make the runs of these suites only")
    parser.add_argument("--most", type=int, default=None, help="make at most so many runs in this call")
    parser.add_argument("--cache_dir", help="a folder for what runs have in common; not given, each makes its own")
    parser.add_argument("--table_only", action="store_true", help="make no run, only the tables")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "erasure.md", help="where the tables go")
    options = parser.parse_args()
    todo = [] if options.table_only else pending(options.results, options.suites)[: options.most]
    # Threads that spin for work are worse than none where processes share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        shared = (options.results, options.workers, options.cache_dir)
        futures = {pool.submit(function, *which, *shared): which for function, which in todo}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            future.result()
            print(f"{done}/{len(todo)}", *(f"{run.suite}/{run.name}" for run in futures[future]), flush=True)
    write_page(options.results, options.docs)


if __name__ == "__main__":
    main()
