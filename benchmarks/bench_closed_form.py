"""How long an erasure without training takes: on fdu's own pipelines, and at the shape of Stable Diffusion 1.5.

    python benchmarks/bench_closed_form.py [--concepts 100] [--record FILE]

Prints the seconds of each erasure, from the names of concepts to the pipeline that no longer draws them; the median of
several where it takes less than a second. ``--record`` keeps them for ``make bench-report``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import promises
import records
import shapes
import torch
from diffusers import DiffusionPipeline

import fdu
from fdu.subjects.registry import subject_of

REPEATS = 5
NAMED = [f"{thing} {setting}" for thing in shapes.THINGS for setting in shapes.SETTINGS]
NAMED += [f"{kind} of a {one}" for kind in shapes.KINDS[1:] for one in NAMED]
NAMED += [f"{one} by a {thing}" for thing in shapes.THINGS for one in NAMED]
"""Names of concepts in the words of the tokenizer."""


def own(name: str, target: str, anchor: str) -> Callable[[], float]:
    """An erasure from one of fdu's pipelines; gives its seconds."""
    subject = subject_of(name)
    pipeline, (pair,) = subject.load(), subject.pairs((target,), (anchor,))
    config = subject.with_preserved(fdu.EraseConfig(train_method="closed_form"), [(target, anchor)])

    def erase() -> float:
        result = fdu.erase(pipeline, *pair, config=config)
        result.trainable.remove()
        return result.seconds

    return erase


def named(pipeline: DiffusionPipeline, count: int, own: bool = False) -> Callable[[], float]:
    """An erasure of many concepts by name, each towards a name of its ``own`` or all towards "painting"."""
    names = [fdu.Concept(name) for name in NAMED[: (1 + own) * count]]
    targets, anchors = names[:count], names[count:] or "painting"
    assert len(names) == (1 + own) * count, f"there are {len(NAMED)} names"

    def erase() -> float:
        result = fdu.erase(pipeline, targets, anchors, train_method="closed_form")
        result.trainable.remove()
        return result.seconds

    return erase


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=100, help="concepts at once; default: %(default)s")
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON file whose part of this suite to write")
    parser.add_argument("--scaled", action="store_true", help="a small model in place of Stable Diffusion 1.5")
    options = parser.parse_args()
    pipeline = shapes.sd15(shapes.SCALED if options.scaled else shapes.FULL)
    erasures = {
        "emoji, fox to wolf": own("emoji", "fox", "wolf"),
        "digits, three to eight": own("digits", "three", "eight"),
        "Stable Diffusion 1.5, 1 concept": named(pipeline, 1),
        f"Stable Diffusion 1.5, {options.concepts} concepts": named(pipeline, options.concepts),
        f"Stable Diffusion 1.5, {options.concepts} concepts, own anchors": named(pipeline, options.concepts, own=True),
    }
    print(f"{records.machine()['device']}, {torch.get_num_threads()} threads")
    seconds = {}
    for what, erase in erasures.items():
        first = erase()
        seconds[what] = statistics.median([erase() for _ in range(REPEATS)]) if first < 1 else first
        print(f"{what:<50}{seconds[what]:8.2f} s", flush=True)
    found = {"seconds": seconds, "threads": torch.get_num_threads(), "concepts": options.concepts}
    promises.judge(promises.closed_form(found))
    if options.record:
        records.keep(options.record, "closed_form", **found)


if __name__ == "__main__":
    main()
