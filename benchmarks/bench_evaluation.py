"""How long an evaluation takes: ten digits, drawn before and after by the embedded pipeline, judged and compared.

    python benchmarks/bench_evaluation.py [--images_per_class 64] [--check] [--record FILE]

Prints the seconds of each part. ``make bench-report`` puts the committed record, results/evaluation/cpu.json, into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

import promises

import fdu
from fdu.evaluation import JUDGED_SEED
from fdu.storage.fingerprint import versions
from fdu.storage.loading import describe_device
from fdu.storage.output import write_json
from fdu.subjects.digits import pipeline as digits

BOUND = 120.0
"""Seconds on two CPU cores."""


def main() -> int:
    """Measure and print; 1 if it took longer than promised under ``--check``, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images_per_class", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help=f"exit with 1 beyond {BOUND:g} seconds")
    parser.add_argument("--record", type=Path, help="the JSON file to write (default: none)")
    options = parser.parse_args()
    probes = [probe for probe in digits.probes("three") if probe.role in ("target", "retained")]
    features, pipeline = digits.features(), digits.load_pipeline()
    drawn: list[fdu.Draws] = []
    calls = {
        "drawing before": lambda: drawn.append(fdu.draw(pipeline, probes, options.images_per_class, JUDGED_SEED)),
        "drawing after": lambda: drawn.append(fdu.draw(pipeline, probes, options.images_per_class, JUDGED_SEED)),
        "judge, features, intervals": lambda: fdu.evaluate(*drawn, probes, features),
    }
    seconds = {}
    for part, call in calls.items():
        started = time.perf_counter()
        call()
        seconds[part] = time.perf_counter() - started
        print(f"{part:<28}{seconds[part]:8.1f} s", flush=True)
    record = {
        "classes": len(probes),
        "images_per_class": options.images_per_class,
        "seconds": seconds,
        "bound": BOUND,
        "device": describe_device("cpu"),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    print(f"{len(probes)} classes x {options.images_per_class} images, before and after; {record['device']}; "
          + ", ".join(f"{name} {number}" for name, number in versions().items()))  # fmt: skip
    if options.record:
        write_json(options.record, record)
    return promises.judge(list(promises.evaluation(record))) * options.check


if __name__ == "__main__":
    sys.exit(main())
