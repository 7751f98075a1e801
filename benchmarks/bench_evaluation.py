"""How long an evaluation takes: ten digits, drawn before and after by the digits pipeline, judged and compared.

    python benchmarks/bench_evaluation.py [--images_per_class 64] [--record FILE]

Prints the seconds of each part. ``--record`` keeps them for ``make bench-report``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import promises
import records

import fdu
from fdu.evaluation import JUDGED_SEED, Sampling
from fdu.subjects.digits import pipeline as digits


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images_per_class", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON file whose part of this suite to write")
    options = parser.parse_args()
    probes = [probe for probe in digits.probes("three") if probe.role in ("target", "retained")]
    features, pipeline = digits.features(), digits.load_pipeline()
    images, sampling = (options.images_per_class, JUDGED_SEED), Sampling().settings()
    drawn: list[fdu.Draws] = []
    calls = {
        "drawing before": lambda: drawn.append(fdu.draw(pipeline, probes, *images, **sampling)),
        "drawing after": lambda: drawn.append(fdu.draw(pipeline, probes, *images, **sampling)),
        "judge, features, intervals": lambda: fdu.evaluate(*drawn, probes, features),
    }
    print(f"{len(probes)} classes x {options.images_per_class} images; {records.machine()['device']}")
    seconds = {}
    for part, call in calls.items():
        started = time.perf_counter()
        call()
        seconds[part] = time.perf_counter() - started
        print(f"{part:<28}{seconds[part]:8.1f} s", flush=True)
    found = {"classes": len(probes), "images_per_class": options.images_per_class, "seconds": seconds}
    promises.judge(promises.evaluation(found))
    if options.record:
        records.keep(options.record, "evaluation", **found)


if __name__ == "__main__":
    main()
