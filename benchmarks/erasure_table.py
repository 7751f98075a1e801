"""Erase every digit and every ink from the embedded pipeline, judge, and write the table.

Run ``python benchmarks/erasure_table.py``.

About two hours of one core, shared by ``--workers`` processes. Every run is one file in ``--results``; a run whose file
is there, with the settings and the pipeline of today, is not made again, so an interrupted call goes on where it
stopped. The tables of ``docs/erasure.md`` are
written anew at the end of each call, from whatever runs are there (``--table_only`` makes none).

Suites: "concepts" (every target, to the superclass and to another class; three seeds for three of them), "divergences"
(one digit, three seeds, both anchors), "sigma" (short runs without preservation, where sigma decides whether the
divergence matters).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fdu
from fdu import embedded
from fdu.embedded.vocabulary import DIGITS, INKS
from fdu.evaluation import JUDGED_SEED, Draws
from fdu.versions import versions

HERE = Path(__file__).parent
BASELINE = "before.json"
ROLES = ("target", "unseen", "retained", "cross_domain")
DRAW: dict[str, Any] = {"seed": JUDGED_SEED, "num_inference_steps": 12, "guidance_scale": 3.0}
"""The seeds of the judged images are none that a training used."""
IMAGES, IMAGES_OF_TARGET = 32, 96
"""Images of a class, and of the target and its unseen phrasings, where chance hides one in ten behind one in five."""
SEEDED = ("three", "seven", "red")
"""The targets that run with three seeds."""
DIVERGENCES = ("mse", "kl", "squared_hellinger", "jensen_shannon", "alpha:0.3", "pearson_chi2")
SIGMA_SETTINGS: dict[str, dict[str, Any]] = {
    "1": {"sigma": 1.0},
    "auto, s0 = 1": {"sigma": "auto", "s0": 1.0},
    "auto, s0 = 10": {"sigma": "auto", "s0": 10.0},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One erasure to make and to judge."""

    suite: str
    target: str
    anchor: str
    seed: int
    settings: tuple[tuple[str, Any], ...] = ()
    roles: tuple[str, ...] = ROLES

    def config(self) -> fdu.EraseConfig:
        """All settings: the defaults, but for those of the run."""
        settings = {"preservation_prompts": embedded.preserved(self.target), **dict(self.settings), "seed": self.seed}
        return fdu.EraseConfig(**settings)

    @property
    def name(self) -> str:
        """The name of its file."""
        parts = [self.target, self.anchor, *(f"{key}={value}" for key, value in self.settings), f"seed={self.seed}"]
        return "_".join(parts).replace(":", "-").replace(" ", "")


def other_class(target: str) -> str:
    """The anchor that is another class: the next digit or ink, and "eight" for "three"."""
    if target == "three":
        return "eight"
    kind = DIGITS if target in DIGITS else INKS
    return kind[(kind.index(target) + 1) % len(kind)]


def runs() -> list[Run]:
    """All runs, in the order in which they are made."""
    targets = (*DIGITS, *INKS)
    concepts = [
        Run("concepts", target, anchor, seed, roles=ROLES if seed == 0 else ROLES[:3])
        for seed in (0, 1, 2)
        for target in (targets if seed == 0 else SEEDED)
        for anchor in (embedded.SUPERCLASS, other_class(target))
    ]
    divergences = [
        Run("concepts", "three", anchor, seed, (("divergence", divergence),), ROLES[:3])
        for anchor in (other_class("three"), embedded.SUPERCLASS)
        for seed in (0, 1, 2)
        for divergence in DIVERGENCES
        if divergence != fdu.EraseConfig().divergence
    ]
    short = {"max_train_steps": 40, "preservation_weight": 0.0}
    sigma = [
        Run("sigma", "three", "eight", seed, tuple({"divergence": name, **scale, **short}.items()), ROLES[::2])
        for seed in (0, 1, 2)
        for scale in SIGMA_SETTINGS.values()
        for name in ("squared_hellinger", "mse", "pearson_chi2")
    ]
    return [*concepts, *sigma, *divergences]


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader, or a later call, sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def conditions() -> dict[str, Any]:
    """What every record notes beside its figures."""
    machine = f"{platform.machine()} CPU, 1 thread a process"
    return {"draw": DRAW, "pipeline": fingerprint(), "machine": machine, "versions": versions()}


@functools.cache
def fingerprint() -> str:
    """The first digits of the SHA-256 of the embedded denoiser's weights."""
    (weights,) = (embedded.PIPELINE_FOLDER / "unet").glob("*.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]


def before(results: Path, workers: int) -> None:
    """Judge the pipeline as it ships: every class, and every target's unseen phrasings."""
    torch.set_num_threads(1)
    pipeline = embedded.load_pipeline()
    seen = [probe for probe in embedded.probes("three") if probe.role != "unseen"]
    unseen = [probe for target in (*DIGITS, *INKS) for probe in embedded.probes(target) if probe.role == "unseen"]
    shares = []
    for probes in (seen, unseen):
        draws = fdu.draw(pipeline, probes, IMAGES, **DRAW)
        judged = zip(probes, draws.images, strict=True)
        shares.append({probe.name: probe.judge(images).count(probe.name) / len(images) for probe, images in judged})
    write(results / BASELINE, {"seen": shares[0], "unseen": shares[1], **conditions()})


def make(run: Run, results: Path, workers: int) -> None:
    """Erase, draw, judge, write."""
    torch.set_num_threads(1)
    target, anchor = embedded.concepts(run.target, run.anchor)
    result = fdu.erase(embedded.load_pipeline(), target, anchor, config=run.config())
    probes = [probe for role in run.roles for probe in embedded.probes(run.target) if probe.role == role]
    images = [
        image
        for probe in probes
        for image in fdu.draw(
            result.pipeline, [probe], IMAGES_OF_TARGET if probe.role in ROLES[:2] else IMAGES, **DRAW
        ).images
    ]
    figures = dataclasses.asdict(fdu.evaluate(Draws(images), Draws(images), probes).after)
    record = {
        "run": dataclasses.asdict(run),
        "figures": figures,
        "sigma": result.sigma,
        "seconds": result.seconds,
        "settings": result.config.as_dict(),
        "workers": workers,
        **conditions(),
    }
    write(results / run.suite / f"{run.name}.json", record)


def pending(results: Path) -> list[tuple[Callable[..., None], tuple[Run, ...]]]:
    """What still has to be made: the pipeline's own figures first, which every row needs, then the runs."""
    first = [] if read(results / BASELINE) else [(before, ())]
    return [*first, *((make, (run,)) for run in runs() if record_of(results, run) is None)]


def read(path: Path) -> dict[str, Any] | None:
    """A record of the pipeline as it is now; None if there is none."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record["pipeline"] == fingerprint() else None


def record_of(results: Path, run: Run) -> dict[str, Any] | None:
    """The record of a run with the settings of today; None if it has to be made."""
    record = read(results / run.suite / f"{run.name}.json")
    return record if record and record["settings"] == run.config().as_dict() else None


def load(results: Path, suite: str) -> list[dict[str, Any]]:
    """The records of a suite that are there, in the order of :func:`runs`."""
    found = [record_of(results, run) for run in runs() if run.suite == suite]
    return [record for record in found if record]


def baseline(judged: dict[str, Any], target: str) -> dict[str, float]:
    """The figures before the erasure of ``target``, from the shares of all classes."""
    own = DIGITS if target in DIGITS else INKS
    retained = [judged["seen"][name] for name in own if name != target]
    return {
        "target_accuracy": judged["seen"][target],
        "unseen_accuracy": judged["unseen"][target],
        "retained_accuracy": sum(retained) / len(retained),
    }


def setting(record: dict[str, Any], name: str) -> Any:
    """A setting of a run."""
    return record["settings"][name]


def kind(record: dict[str, Any]) -> str:
    """Which of the two kinds of anchor a run had."""
    return "superclass" if record["run"]["anchor"] == embedded.SUPERCLASS else "another class"


def relative(record: dict[str, Any], baselines: dict[str, dict[str, float]]) -> float:
    """Retained accuracy as a share of what it was before."""
    kept: float = record["figures"]["retained_accuracy"] / baselines[record["run"]["target"]]["retained_accuracy"]
    return kept


def share(value: float | None) -> str:
    """A share of images, with three digits."""
    return "" if value is None else f"{value:.3f}"


def worst_first(values: list[float], lowest: bool) -> str:
    """Median and worst of several runs."""
    worst = min(values) if lowest else max(values)
    return f"{statistics.median(values):.3f} ({worst:.3f})"


def concept_rows(records: list[dict[str, Any]], baselines: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row a run: target, unseen and retained accuracy, before and after."""
    rows = []
    for record in records:
        run, after = record["run"], record["figures"]
        was = baselines[run["target"]]
        rows.append(
            [
                run["target"],
                run["anchor"],
                str(run["seed"]),
                f"{share(was['target_accuracy'])} -> {share(after['target_accuracy'])}",
                f"{share(was['unseen_accuracy'])} -> {share(after['unseen_accuracy'])}",
                f"{share(was['retained_accuracy'])} -> {share(after['retained_accuracy'])}",
                share(relative(record, baselines)),
                f"{share(after['worst_retained_accuracy'])} {after['worst_retained_class']}",
                share(after["cross_domain_accuracy"]),
            ]
        )
    return rows


def divergence_rows(records: list[dict[str, Any]], baselines: dict[str, dict[str, float]]) -> list[list[str]]:
    """A row a divergence and anchor, its seeds side by side."""
    rows = []
    for anchor in (other_class("three"), embedded.SUPERCLASS):
        for divergence in DIVERGENCES:
            own = [r for r in records if r["run"]["anchor"] == anchor and setting(r, "divergence") == divergence]
            if own:
                figures = [record["figures"] for record in own]
                rows.append(
                    [
                        divergence,
                        anchor,
                        " ".join(share(one["target_accuracy"]) for one in figures),
                        " ".join(share(one["unseen_accuracy"]) for one in figures),
                        worst_first([relative(record, baselines) for record in own], lowest=True),
                        worst_first([one["worst_retained_accuracy"] for one in figures], lowest=True),
                    ]
                )
    return rows


def sigma_rows(records: list[dict[str, Any]]) -> list[list[str]]:
    """A row a scale, a column a divergence: the target accuracy that is left."""
    rows = []
    for label, scale in SIGMA_SETTINGS.items():
        cells = [label]
        for divergence in ("squared_hellinger", "mse", "pearson_chi2"):
            wanted = {"divergence": divergence, **scale}
            own = [r for r in records if all(setting(r, name) == value for name, value in wanted.items())]
            cells.append(" ".join(share(record["figures"]["target_accuracy"]) for record in own))
        rows.append(cells)
    return rows


def checks(records: list[dict[str, Any]], baselines: dict[str, dict[str, float]]) -> list[list[str]]:
    """The bounds that every run has to keep, and the worst run of each."""
    bounds: list[tuple[str, str, Callable[[dict[str, Any]], float], float, bool]] = [
        ("retained accuracy, share of before", "both", lambda r: relative(r, baselines), 0.95, True),
        ("worst retained class", "both", lambda r: r["figures"]["worst_retained_accuracy"], 0.85, True),
        ("target accuracy", "superclass", lambda r: r["figures"]["target_accuracy"], 0.20, False),
        ("target accuracy, unseen phrasings", "superclass", lambda r: r["figures"]["unseen_accuracy"], 0.20, False),
        ("target accuracy", "another class", lambda r: r["figures"]["target_accuracy"], 0.05, False),
        ("target accuracy, unseen phrasings", "another class", lambda r: r["figures"]["unseen_accuracy"], 0.05, False),
    ]
    rows = []
    for label, anchors, figure, bound, lowest in bounds:
        own = [record for record in records if anchors in ("both", kind(record))]
        if not own:
            continue
        worst = (min if lowest else max)(own, key=figure)
        inside = [figure(record) >= bound if lowest else figure(record) <= bound for record in own]
        run = worst["run"]
        rows.append(
            [
                label,
                anchors,
                f"{'>=' if lowest else '<='} {bound:.2f}",
                f"{sum(inside)} of {len(own)}",
                f"{figure(worst):.3f} ({run['target']} to {run['anchor']}, seed {run['seed']})",
            ]
        )
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_page(results: Path, docs: Path) -> None:
    """Write the tables of all runs that are there."""
    everything, judged = load(results, "concepts"), read(results / BASELINE)
    if not everything or judged is None:
        return
    baselines = {target: baseline(judged, target) for target in judged["seen"]}
    default = fdu.EraseConfig().divergence
    concepts = [record for record in everything if setting(record, "divergence") == default]
    divergences = [record for record in everything if record["run"]["target"] == "three"]
    sigma = load(results, "sigma")
    total = len(runs())
    made = len(everything) + len(sigma)
    used = everything[0]
    page = PAGE.format(
        made=f"all {total}" if made == total else f"{made} of {total}",
        images=IMAGES,
        images_of_target=IMAGES_OF_TARGET,
        steps=DRAW["num_inference_steps"],
        guidance=DRAW["guidance_scale"],
        settings=", ".join(f"{name} {setting(used, name)}" for name in SHOWN_SETTINGS),
        machine=used["machine"],
        versions=", ".join(f"{name} {version}" for name, version in used["versions"].items() if name != "fdu"),
        checks=table(["figure", "anchor", "bound", "runs inside", "worst run"], checks(concepts, baselines)),
        concepts=table(
            ["target", "anchor", "seed", "target", "unseen", "retained", "of before", "worst retained", "other kind"],
            concept_rows(concepts, baselines),
        ),
        divergences=table(
            ["divergence", "anchor", "target", "unseen", "retained, of before", "worst retained"],
            divergence_rows(divergences, baselines),
        ),
        sigma=table(["sigma", "squared_hellinger", "mse", "pearson_chi2"], sigma_rows(sigma)),
        sigma_retained=share(min((one["figures"]["retained_accuracy"] for one in sigma), default=None)) or "-",
    )
    docs.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page)


SHOWN_SETTINGS = (
    "divergence", "sigma", "s0", "train_method", "rank", "max_train_steps", "train_batch_size", "learning_rate",
    "lr_scheduler", "preservation_weight", "num_latents",
)  # fmt: skip

PAGE = """# Every class of the embedded pipeline, erased

Made by `python benchmarks/erasure_table.py` ({made} runs; the raw figures are in `benchmarks/results/erasure/`).
{machine}; {versions}.

Each row is one erasure with the default settings ({settings}). Preserved are the superclass and the neighbours of the
target's kind, in one of the phrasings that are judged. Judged are {images} images a class ({images_of_target} of the
target), {steps} steps, guidance {guidance}, from seeds that no training used, by a classifier that learnt from real
digits and never saw the generator. "Unseen" are
phrasings of the target that training never had; "other kind" are the inks if a digit was erased, and the digits if
an ink was. Towards the superclass, chance is one image in ten for a digit and one in twenty for an ink.

The text embeddings of this pipeline are nearly orthogonal, those of a real CLIP are not: there, expect more harm to
neighbours than here.

## Bounds

{checks}

## Every target

{concepts}

## The divergence, with sigma calibrated

Erasing "three", one figure a seed; retained as median (worst) of the seeds. `kl` is half of `mse`, which the
standardisation to h'(0) = 1 takes out: the two train the same model.

{divergences}

## What sigma decides

"three" to "eight", stopped early (40 steps, no preservation): the target accuracy that is left, one
figure a seed. At sigma = 1, s is far below 1, every divergence is a multiple of mse, and Adam removes the factor:
expect equal columns. Calibrated, the divergence matters: expect the chi-square, whose few large errors take the whole
step, to erase slower under Adam. The lowest retained accuracy of these runs was {sigma_retained}.

{sigma}
"""


def main() -> None:
    """Make the runs that are missing, then the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "erasure", help="a folder, a file a run")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--most", type=int, default=None, help="make at most so many runs in this call")
    parser.add_argument("--table_only", action="store_true", help="make no run, only the tables")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "erasure.md", help="where the tables go")
    options = parser.parse_args()
    todo = [] if options.table_only else pending(options.results)[: options.most]
    # Threads that spin for work are worse than none where processes share the cores.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        futures = {pool.submit(function, *which, options.results, options.workers): which for function, which in todo}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            future.result()
            print(f"{done}/{len(todo)}", *(run.name for run in futures[future]), flush=True)
    write_page(options.results, options.docs)


if __name__ == "__main__":
    main()
