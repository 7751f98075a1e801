"""Time fdu's training against the published loops: ``python benchmarks/bench_training.py [--check]``.

Every run is a fresh process (benchmarks/training_runs.py). Those of the steps take turns, --rounds times, and medians
count; whole jobs, which differ by far more than they vary, are measured once. Writes the record, prints the page, and
with --docs writes it. --check exits with 1 if a bound is missed; --page_only measures nothing. Some ten minutes on two
cores; leave the machine alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from markdown_table import markdown

from fdu.storage.output import write_json

HERE = Path(__file__).parent
PLAIN = "fdu"
KEPT, JOB, REFERENCE_JOB = "fdu, frozen outputs kept", "fdu job", "reference job"
Figures = dict[str, float]


def measure(name: str, threads: int, wrapper: str) -> Figures:
    """One run, in a process of its own."""
    command = [*shlex.split(wrapper), sys.executable, str(HERE / "training_runs.py"), name]
    # Threads that wait sleep: spinning would take the cores from those that compute.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def machine(threads: int) -> dict[str, Any]:
    """Device and versions."""
    from fdu.storage.versions import versions

    path = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {"device": f"{platform.machine()} CPU ({cpu}), {threads} threads", "versions": versions()}


def make_record(rounds: int, threads: int, wrapper: str) -> dict[str, Any]:
    """Run everything."""
    import sd15_shape
    import torch
    from training_runs import JOB_SHARE, LATENTS, RUNS

    runs: dict[str, list[Figures]] = {name: [] for name in RUNS}
    for turn in range(rounds):
        for name in RUNS if turn == 0 else [name for name, run in RUNS.items() if run.what == "step"]:
            runs[name].append(measure(name, threads, wrapper))
            print(f"round {turn + 1}, {name}: {runs[name][-1]}", file=sys.stderr)
    return {
        **machine(threads),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "job_share": JOB_SHARE,
        "latents": LATENTS,
        "job_latents": RUNS[JOB].config().num_latents,
        "proportions": {"1": sd15_shape.proportions(1, 1, 1), "scaled": sd15_shape.proportions()},
        "runs": runs,
    }


def median(record: dict[str, Any], name: str, figure: str) -> float:
    """Of one figure over the rounds."""
    return statistics.median(figures[figure] for figures in record["runs"][name])


def job(record: dict[str, Any], name: str) -> float:
    """Seconds of the whole job."""
    return median(record, name, "wall_sampling") + median(record, name, "wall_training")


def bounds(record: dict[str, Any]) -> list[tuple[str, float, str, float, bool]]:
    """What is promised: in words, the figure, the sense of the bound, the bound, and whether it holds."""
    rate = median(record, "reference", "wall_step") / median(record, KEPT, "wall_step")
    peak = median(record, KEPT, "peak") / median(record, "reference", "peak")
    factor = job(record, REFERENCE_JOB) / job(record, JOB)
    return [
        ("step rate, of the reference loop's", rate, ">=", 1.6, rate >= 1.6),
        ("peak memory of the steps, of the reference loop's", peak, "<=", 0.6, peak <= 0.6),
        ("whole job, times faster", factor, ">=", 4.0, factor >= 4.0),
    ]


def step_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row a way of training: its step and its memory, and both against the reference in its own setting."""
    rows = []
    for name in record["runs"]:
        if name in (JOB, REFERENCE_JOB):
            continue
        base = "reference, preserving" if "preserving" in name else "reference"
        cells = [name]
        for unit in ("wall", "cores"):
            seconds = median(record, name, f"{unit}_step")
            cells += [f"{seconds:.2f}", f"{median(record, base, f'{unit}_step') / seconds:.2f}"]
        peak = median(record, name, "peak")
        rows.append([*cells, f"{peak:.0f}", f"{peak / median(record, base, 'peak'):.2f}"])
    return rows


def job_rows(record: dict[str, Any]) -> list[list[str]]:
    """A row a loop: the measured job, its parts and its memory."""
    rows = []
    for name in (REFERENCE_JOB, JOB):
        parts = [median(record, name, f"wall_{part}") for part in ("sampling", "training")]
        rows.append([name, *(f"{part:.1f}" for part in (*parts, sum(parts))), f"{median(record, name, 'highest'):.0f}"])
    return rows


def job_factor(record: dict[str, Any], latents: int) -> float:
    """By how much the whole job is faster if fdu samples so many latents, from the seconds for one."""
    one = median(record, JOB, "wall_sampling") / record["job_latents"]
    estimate = one * latents / record["job_share"] + median(record, JOB, "wall_training")
    return job(record, REFERENCE_JOB) / estimate


def latents_rows(record: dict[str, Any]) -> list[list[str]]:
    """How the factor of the whole job depends on how many latents fdu samples."""
    return [[str(latents), f"{job_factor(record, latents):.1f}"] for latents in (record["latents"], 200, 500, 1000)]


def proportion_rows(record: dict[str, Any]) -> list[list[str]]:
    """The denoiser's own count, and every other part's as a share of it, in Stable Diffusion 1.5 and as measured."""
    full, scaled = record["proportions"]["1"], record["proportions"]["scaled"]
    rows = []
    for unit in ("GFLOP", "M parameters"):
        base = f"denoiser, {unit}"
        rows.append([base, f"{full[base]:.1f}", f"{scaled[base]:.2f}", f"1/{full[base] / scaled[base]:.1f}"])
        for name in full:
            if name.endswith(unit) and name != base:
                label = f"{name.removesuffix(f', {unit}')}, of the denoiser's {unit.removeprefix('M ')}"
                rows.append([label, f"{full[name] / full[base]:.3f}", f"{scaled[name] / scaled[base]:.3f}", ""])
    return rows


STEP_HEADER = ["loop", "s a step", "x rate", "core s a step", "x rate", "peak, MiB", "of reference's"]
PAGE = """# How fast the training is

Made by `python benchmarks/bench_training.py --docs docs/training.md`; the record is `{path}`.
{device}, {capability};
{versions};
{date}. Steps: medians of {rounds} rounds, every run in a fresh process, taking turns. Whole jobs: measured once.

The **reference** (`benchmarks/reference_loop.py`) does what the published loops of concept ablation and f-DMU do, with
the settings of f-DMU's published runs: images of the anchor sampled to pixels (1000, of 200 prompts, 25 steps,
guidance 6) and kept as JPEG files; in every batch the autoencoder encodes the images and the text encoder both
prompts; a deep copy of the denoiser is the frozen one, as in f-DMU ("without a copy": the trained one without a
gradient, as in concept ablation). **fdu** is `fdu.erase` with its defaults for what to sample
({latents} latents, here at the reference's 25 steps and guidance too). Both train keys and values of cross-attention
with AdamW, batch 2, two batches a step, the squared Hellinger loss, no preservation unless said, in fp32.

The model has the shape of Stable Diffusion 1.5 with random weights, every width a quarter and every side a half
(`benchmarks/sd15_shape.py`), so that all parts keep their shares, see [below](#proportions). What cannot be seen here
is what a GPU adds: mixed precision (f-DMU's frozen pass has it), fused attention, launches, 8-bit moments.

## Bounds

{bounds}

The first two are of "{kept}": `frozen_batches` draws half of the run's batches beforehand, with the frozen outputs,
and uses each of them twice; so often the published loops take each of their images, though they noise it anew. The
time to make the outputs counts. Without it, each batch drawn afresh as in the reference, the step rate is {plain:.2f}
of the reference's. What `frozen_batches` does to an erasure is in docs/erasure.md, "Weightings, timesteps, surgery,
kept outputs". The job is of fdu without it, with {latents} latents, see [below](#whole-job) for more of them.

## Steps

{steps}

Seconds a step are medians from the end of one optimizer step to that of the next (where frozen outputs are kept, with
its share of the time to make them), on the clock and, which other processes disturb less, as the cores count them;
"x rate" is against the reference. Peak memory is the most that the process held between the end of the first step and
that of the last, less what it held after the imports: weights, optimizer, activations. "Checkpointed" computes
activations again (`gradient_checkpointing`); "preserving" adds a second batch that keeps what the model knows: the
denoising loss in the reference, the frozen outputs in fdu, which cost a forward pass more.

## Whole job

The published job in {share} parts, one of them measured: images, prompts, latents and steps in proportion.

{jobs}

Most of the factor is what is sampled. The reference samples its 1000 images whatever the run consumes; fdu samples
{latents} by default (`num_latents`). From the seconds for one latent, here sampled {job_latents} at a time and so at a
higher price than in full batches, the factor with more of them:

{by_latents}

## Proportions

{proportions}
"""


def page(record: dict[str, Any], path: Path) -> str:
    """The record as Markdown."""
    verdicts = [
        [label, f"{value:.2f}", f"{sense} {bound:g}", "holds" if holds else "**fails**"]
        for label, value, sense, bound, holds in bounds(record)
    ]
    return PAGE.format(
        path=path,
        device=record["device"],
        capability=record["capability"],
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        date=record["date"],
        rounds=record["rounds"],
        latents=record["latents"],
        share=record["job_share"],
        job_latents=record["job_latents"],
        kept=KEPT,
        plain=median(record, "reference", "wall_step") / median(record, PLAIN, "wall_step"),
        bounds=markdown(["figure", "measured", "promised", ""], verdicts),
        steps=markdown(STEP_HEADER, step_rows(record)),
        jobs=markdown(["loop", "sampling, s", "training, s", "all, s", "peak, MiB"], job_rows(record)),
        by_latents=markdown(["latents", "times faster"], latents_rows(record)),
        proportions=markdown(["", "Stable Diffusion 1.5", "measured", "scale"], proportion_rows(record)),
    )


def main() -> int:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, default=HERE / "results" / "training" / "cpu.json", help="JSON")
    parser.add_argument("--docs", type=Path, help="a page to write")
    parser.add_argument("--rounds", type=int, default=3, help="how often every run is made")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each run")
    parser.add_argument("--wrapper", default="", help="put before each run's command, such as 'taskset -c 0,1'")
    parser.add_argument("--page_only", action="store_true", help="measure nothing, read the record")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is missed")
    options = parser.parse_args()
    if not options.page_only:
        record = make_record(options.rounds, options.threads, options.wrapper)
        write_json(options.record, record)
    record = json.loads(options.record.read_text())
    root = HERE.parent
    shown = options.record.resolve()
    text = page(record, shown.relative_to(root) if shown.is_relative_to(root) else options.record)
    print(text)
    if options.docs:
        options.docs.write_text(text)
    return int(options.check and not all(holds for *_, holds in bounds(record)))


if __name__ == "__main__":
    sys.exit(main())
