"""Time fdu's training against the published loops: ``python benchmarks/bench_training.py [--check]``.

Every run is a fresh process (``--run NAME``). The runs that measure steps take turns, --rounds times, and medians
count; whole jobs, which differ by far more than they vary, are measured once. Writes the record, of which
``make bench-report`` writes docs/training.md, and prints it. Takes ten minutes on two cores; leave the machine alone.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import promises
import reference_loop
import shapes
import timing
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fdu
from fdu.storage.fingerprint import versions
from fdu.storage.output import write_json

RECORD = Path(__file__).parent / "results" / "training" / "cpu.json"
Figures = dict[str, float]


TARGET, ANCHOR = "van gogh", "painting"
FULL = reference_loop.Settings()
JOB_SHARE = 50
"""The measured job is this part of the published one: of its images, prompts, latents and steps."""
STEPS = 8
"""Optimizer steps of a run that measures the step; the first is not counted."""
LATENTS = fdu.EraseConfig().num_latents
SHARED = (
    "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "learning_rate", "adam_weight_decay",
    "max_grad_norm", "preservation_weight", "sample_batch_size", "guidance_scale", "mixed_precision", "seed",
)  # fmt: skip
"""Settings that mean the same in both loops."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A loop, "reference" or "fdu", with the settings of the reference, which fdu shares."""

    loop: str
    shared: reference_loop.Settings
    own: tuple[tuple[str, Any], ...] = ()
    """Further settings of fdu."""
    job: bool = False
    """Whether the whole job is measured, with its sampling, and not the step alone."""

    def config(self) -> fdu.EraseConfig:
        """The settings of fdu."""
        settings: dict[str, Any] = {
            **{name: getattr(self.shared, name) for name in SHARED},
            "num_inference_steps": self.shared.num_inference_steps if self.job else 1,
            "num_latents": max(2, round(LATENTS / JOB_SHARE)) if self.job else 4,
            "train_method": "cross_attention",
            "divergence": "squared_hellinger",
            "sigma": 1.0,
            "lr_scheduler": "constant",
            **dict(self.own),
        }
        return fdu.EraseConfig(**settings)

    @property
    def sampling_calls(self) -> int:
        """Calls of the denoiser that sample."""
        config = self.config()
        drawn = config.num_latents if self.loop == "fdu" else self.shared.num_images if self.job else 0
        return math.ceil(drawn / self.shared.sample_batch_size) * config.num_inference_steps


def a_step(steps: int = STEPS, batch: int = FULL.train_batch_size, **changes: Any) -> reference_loop.Settings:
    """The published settings, but for so many steps of a batch."""
    return dataclasses.replace(
        FULL, max_train_steps=steps, train_batch_size=batch, num_images=steps * batch, **changes
    )  # fmt: skip


STEP, PRESERVING = a_step(), a_step(preservation_weight=1.0)
PART = dataclasses.replace(
    FULL, num_images=FULL.num_images // JOB_SHARE, max_train_steps=FULL.max_train_steps // JOB_SHARE
)
# Half of the batches: each is used twice, as often as the published runs take each of their images.
KEPT = ("frozen_batches", STEPS * FULL.gradient_accumulation_steps // 2)
CHECKPOINTED = ("gradient_checkpointing", True)
RUNS = {
    "reference": Run("reference", STEP),
    "reference, without a copy": Run("reference", a_step(copies=False)),
    "fdu": Run("fdu", STEP),
    "fdu, frozen outputs kept": Run("fdu", STEP, (KEPT,)),
    "fdu, checkpointed": Run("fdu", STEP, (CHECKPOINTED,)),
    "fdu, frozen outputs kept, checkpointed": Run("fdu", STEP, (KEPT, CHECKPOINTED)),
    "reference, preserving": Run("reference", PRESERVING),
    "fdu, preserving": Run("fdu", PRESERVING),
    "reference job": Run("reference", PART, job=True),
    "fdu job": Run("fdu", PART, job=True),
}


class Moment(NamedTuple):
    """Seconds on the wall clock, and those that all cores spent on this process."""

    wall: float
    cores: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter(), time.process_time())


class Memory:
    """MiB that this process holds (from Linux), or its tensors on the GPU."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def now(self) -> float:
        """At this moment."""
        return torch.cuda.memory_allocated() / 2**20 if self.device == "cuda" else self._read("VmRSS")

    def peak(self) -> float:
        """The most since the last :meth:`forget`; on a GPU, once it has done its work."""
        if self.device != "cuda":
            return self._read("VmHWM")
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20

    def forget(self) -> None:
        """Start the peak again, without memory that is free."""
        if self.device == "cuda":
            return torch.cuda.reset_peak_memory_stats()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    @staticmethod
    def _read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith(f"{field}:")]
        return int(line.split()[1]) / 1024


class Watch:
    """When the denoisers were called and the optimizer stepped, and the memory between the first and last step."""

    def __init__(self, denoiser: nn.Module, memory: Memory) -> None:
        self.memory = memory
        self.calls: list[tuple[Moment, bool]] = []
        """When, and whether a graph was made."""
        self.steps: list[Moment] = []
        self.peak = self.highest = 0.0
        """MiB: the most between the first and the last step; the most so far."""
        self._hooks = [
            # A function, which a copy of the denoiser shares; a bound method it would copy with all this.
            denoiser.register_forward_pre_hook(lambda *_: self._called()),
            register_optimizer_step_post_hook(lambda *_: self._stepped()),
        ]

    def _called(self) -> None:
        self.calls.append((Moment.now(), torch.is_grad_enabled()))

    def _stepped(self) -> None:
        peak = self.memory.peak()
        self.steps.append(Moment.now())
        self.highest = max(self.highest, peak)
        if len(self.steps) == 1:
            self.memory.forget()
        self.peak = self.memory.peak()

    def stop(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()


def measure(run: Run, build: Callable[[], DiffusionPipeline] | None = None, device: str = "cpu") -> dict[str, float]:
    """The figures of one run. A step is the median from the end of one to that of the next; where frozen outputs are
    kept, with its share of the time that making them took.

    Args:
        build: makes the pipeline, by default the scaled one of shapes.py.
        device: whose memory to watch.
    """
    assert callable(fdu.erase)  # which imports all that it needs, for both loops, before memory is counted
    memory = Memory(device)
    imported = memory.now()
    pipeline = (build or shapes.sd15)()
    watch = Watch(pipeline.unet, memory)
    memory.forget()
    started = Moment.now()
    try:
        with tempfile.TemporaryDirectory() as folder:
            losses = (reference if run.loop == "reference" else ours)(run, pipeline, Path(folder))
        ended = Moment.now()
    finally:
        watch.stop()
    steps = run.shared.max_train_steps
    assert len(losses) == steps == len(watch.steps) and all(map(math.isfinite, losses))
    training = watch.calls[run.sampling_calls][0]
    kept = run.config().frozen_batches > 0
    first_trained = next(moment for moment, graph in watch.calls if graph)
    figures = {"peak": watch.peak - imported, "highest": max(watch.highest, watch.peak) - imported}
    for unit in Moment._fields:
        times = [getattr(moment, unit) for moment in watch.steps]
        step = statistics.median(after - before for before, after in itertools.pairwise(times))
        if kept:
            step += (getattr(first_trained, unit) - getattr(training, unit)) / steps
        figures[f"{unit}_step"] = step
        figures[f"{unit}_sampling"] = getattr(training, unit) - getattr(started, unit)
        figures[f"{unit}_training"] = getattr(ended, unit) - getattr(training, unit)
    return figures


def reference(run: Run, pipeline: DiffusionPipeline, folder: Path) -> list[float]:
    """The reference loop. Where the step alone is measured, its images are noise."""
    prompts = shapes.anchor_prompts(200 // JOB_SHARE)
    if run.job:
        reference_loop.sample_images(pipeline, prompts, folder, run.shared)
        return reference_loop.train(pipeline, TARGET, prompts, folder, run.shared)
    side = pipeline.vae.config.sample_size
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(reference_loop.image_path(folder, 0))
    for number in range(1, run.shared.num_images):
        shutil.copyfile(reference_loop.image_path(folder, 0), reference_loop.image_path(folder, number))
    return reference_loop.train(pipeline, TARGET, prompts, folder, run.shared)


def ours(run: Run, pipeline: DiffusionPipeline, folder: Path) -> list[float]:
    """The loop of fdu."""
    prompts = shapes.anchor_prompts(200 // JOB_SHARE)
    texts = [template.format(prompt=one, target=TARGET) for template in reference_loop.TEMPLATES for one in prompts]
    target, anchor = fdu.Concept(TARGET, tuple(texts)), fdu.Concept(ANCHOR, (*prompts, *prompts))
    return fdu.erase(pipeline, target, anchor, config=run.config()).history["loss"]


def run_apart(name: str, threads: int, wrapper: str) -> Figures:
    """One run, in a process of its own."""
    command = [*shlex.split(wrapper), sys.executable, __file__, "--run", name]
    # Threads that wait sleep: spinning would take the cores from those that compute.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def make_record(rounds: int, threads: int, wrapper: str) -> dict[str, Any]:
    """Run everything."""
    runs: dict[str, list[Figures]] = {name: [] for name in RUNS}
    for turn in range(rounds):
        for name in RUNS if turn == 0 else [name for name, run in RUNS.items() if not run.job]:
            runs[name].append(run_apart(name, threads, wrapper))
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
    parser.add_argument("--run", choices=RUNS, metavar="NAME", help=f"one of: {'; '.join(RUNS)}; prints its figures")
    parser.add_argument("--show", action="store_true", help="measure nothing; print the record")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a promise is broken")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(RUNS[options.run])))
        return 0
    if not options.show:
        write_json(options.record, make_record(options.rounds, options.threads, options.wrapper))
    record = json.loads(options.record.read_text())
    show(record)
    return promises.judge(list(promises.training(record))) * options.check


if __name__ == "__main__":
    sys.exit(main())
