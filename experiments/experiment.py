"""Parts that all experiments share: the command line, and what pages are made of."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fdu.comparison.sweep import Job, Record, sweep

HERE = Path(__file__).parent


def run(
    description: str | None,
    suites: Callable[[Path], Mapping[str, Sequence[Job]]],
    write_page: Callable[[Path, Path], None],
) -> None:
    """The command of an experiment: make the records that are missing, then the page.

    Args:
        description: for ``--help``.
        suites: given a folder for shared data, the jobs by the name of their JSON Lines file.
        write_page: writes the page into a folder (second argument) from the records in a folder (first one).
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each")
    parser.add_argument("--only", default="", help="make only the records whose name contains this")
    parser.add_argument("--most", type=int, help="make at most this many records per file")
    parser.add_argument("--page_only", action="store_true", help="make no record, only the page")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the records")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page_only:
        for suite, jobs in suites(HERE / "cache").items():
            chosen = [job for job in jobs if options.only in f"{suite}/{job.name}"]

            def tell(line: str, suite: str = suite) -> None:
                print(f"{suite} {line}", flush=True)

            sweep(chosen, options.results / f"{suite}.jsonl", options.workers, options.most, tell)
    write_page(options.results, options.docs)


def fill(name: str, **fields: Any) -> str:
    """The page of a template, whose fields are those of :meth:`str.format`."""
    return (HERE / "templates" / name).read_text(encoding="utf-8").format(**fields)


def finding(verdict: str, **fields: Any) -> dict[str, Any]:
    """The outcome of a claim for a template: the verdict in a few words, as the start of a sentence, and figures."""
    return {"verdict": verdict, "said": verdict[0].upper() + verdict[1:], **fields}


def conditions(record: Record, without: Sequence[str] = ()) -> dict[str, str]:
    """Device and versions of a record, in words."""
    named = [f"{name} {number}" for name, number in record["versions"].items() if name not in without]
    return {"device": record["device"], "versions": ", ".join(named)}


def of_total(made: int, total: int) -> str:
    """As "all 9" or "3 of 9"."""
    return f"all {total}" if made == total else f"{made} of {total}"
