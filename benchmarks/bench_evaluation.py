"""How long an evaluation takes: ten digits, drawn before and after by the embedded pipeline, judged and compared.

    python benchmarks/bench_evaluation.py [--images_per_class 64] [--check] [--record FILE]

Prints seconds of each part and, with ``--check``, fails beyond the bound of two minutes on two CPU cores. The committed
record is benchmarks/results/evaluation/cpu.json, which ``make bench-report`` puts into docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

import fdu
from fdu.evaluation import JUDGED_SEED
from fdu.storage.loading import describe_device
from fdu.storage.output import write_json
from fdu.storage.versions import versions
from fdu.subjects.digits import pipeline as digits

BOUND = 120.0
"""Seconds on two CPU cores."""


def main() -> int:
    """Measure and print; 1 if the bound is missed under ``--check``, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images_per_class", type=int, default=64)
    parser.add_argument("--check", action="store_true", help="fail beyond the bound")
    parser.add_argument("--record", type=Path, help="a JSON file to keep the figures in")
    options = parser.parse_args()
    probes = [probe for probe in digits.probes("three") if probe.role in ("target", "retained")]
    features, pipeline = digits.features(), digits.load_pipeline()
    parts, drawn = {}, []
    for side in ("before", "after"):
        started = time.perf_counter()
        drawn.append(fdu.draw(pipeline, probes, options.images_per_class, JUDGED_SEED, description=side))
        parts[f"drawing {side}"] = time.perf_counter() - started
    started = time.perf_counter()
    fdu.evaluate(*drawn, probes, features)
    parts["judge, features, intervals"] = time.perf_counter() - started
    total = sum(parts.values())
    record = {
        "classes": len(probes),
        "images_per_class": options.images_per_class,
        "seconds": parts,
        "bound": BOUND,
        "device": describe_device("cpu"),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    print(f"{len(probes)} classes x {options.images_per_class} images, before and after; {record['device']}")
    print(", ".join(f"{name} {number}" for name, number in versions().items()))
    for name, seconds in {**parts, "in all": total}.items():
        print(f"{name:<28}{seconds:8.1f} s")
    if options.record:
        write_json(options.record, record)
    if options.check and total > BOUND:
        print(f"beyond the bound of {BOUND:.0f} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
