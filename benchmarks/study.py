"""Divergences against each other on the embedded pipeline, and the claims of the paper about them.

Run ``python benchmarks/study.py``.

About an hour of two cores, shared by ``--workers`` processes. Every run is one file in ``--results``; a run whose
file is there, with the settings and the pipeline of today, is not made again, so an interrupted call goes on where it
stopped. ``docs/results.md`` is written anew at the end of each call, from whatever is there (``--page_only`` makes no
run).

Suites: "divergences" (three targets, six divergences, three values of s0, three seeds) and "variational" (the min-max
game against the exact divergence, one target, after several numbers of steps, three seeds). Runs are short and without
preservation: with the defaults every divergence erases all there is (docs/erasure.md), and nothing could be compared.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from study_page import write_page

from fdu.comparison.plan import Candidate, Comparison, Drawing
from fdu.comparison.runs import make_runs
from fdu.config import EraseConfig

HERE = Path(__file__).parent
PAIRS = (("three", "eight"), ("seven", "eight"), ("red", "green"))
"""Two digits and an ink, each towards another class, where chance does not blur what is left."""
DIVERGENCES = ("mse", "squared_hellinger", "jensen_shannon", "le_cam", "alpha:1.5", "pearson_chi2")
"""Between them all there is, from damping large errors to amplifying them. kl trains what mse trains, and alpha:0.3
nearly what squared_hellinger does; le_cam and alpha:1.5 stand in their places."""
S0 = (0.3, 1.0, 10.0)
SEEDS = (0, 1, 2)
GAMES = ("kl", "jensen_shannon", "squared_hellinger")
STEPS = (20, 40, 80)
SHORT = EraseConfig(max_train_steps=40, preservation_weight=0.0)
DRAWING = Drawing(images_per_class=32, images_of_target=96, num_inference_steps=12)


def comparisons() -> dict[str, Comparison]:
    """The suites by name."""
    steady = EraseConfig(preservation_weight=0.0, lr_scheduler="constant", learning_rate=1e-3)
    games = [
        # At a constant learning rate a run of 20 steps is the beginning of one of 80.
        Candidate(divergence, 1.0, (("variational", True), *steps) if game else steps)
        for count in STEPS
        for steps in [(("max_train_steps", count),)]
        for divergence in GAMES
        for game in (False, True)
    ]
    return {
        "divergences": Comparison(
            model="embedded",
            pairs=PAIRS,
            candidates=tuple(Candidate(divergence, s0) for s0 in S0 for divergence in DIVERGENCES),
            seeds=SEEDS,
            base=SHORT,
            drawing=DRAWING,
        ),
        "variational": Comparison(
            model="embedded", pairs=PAIRS[:1], candidates=tuple(games), seeds=SEEDS, base=steady, drawing=DRAWING
        ),
    }


def main() -> None:
    """Make the runs that are missing, then the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "study", help="a folder, a file a run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--suites", nargs="+", choices=list(comparisons()), help="make the runs of these suites only")
    parser.add_argument("--most", type=int, default=None, help="make at most so many runs of a suite in this call")
    parser.add_argument("--cache_dir", type=Path, default=HERE / "cache", help="for what runs have in common")
    parser.add_argument("--page_only", action="store_true", help="make no run, only the page")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "results.md", help="where the page goes")
    options = parser.parse_args()
    suites = comparisons()
    for name, comparison in suites.items():
        if not options.page_only and (options.suites is None or name in options.suites):
            records = options.results / name

            def tell(line: str, name: str = name) -> None:
                print(f"{name} {line}", flush=True)

            make_runs(comparison, records, options.cache_dir, options.workers, options.most, tell)
    write_page(suites, options.results, options.docs)


if __name__ == "__main__":
    main()
