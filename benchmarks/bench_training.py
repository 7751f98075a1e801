"""Time fdu's training against the published loops: ``python benchmarks/bench_training.py [--record FILE]``.

Every run has a fresh process (``--run NAME``). The runs that measure steps take turns, --rounds times, and medians
count. The two whole jobs differ by far more than they vary, so each is measured once. Takes ten minutes on two cores;
leave the machine alone.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import math
import os
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
import records
import reference_loop
import shapes
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fdu

Figures = dict[str, float]

TARGET, ANCHOR = "van gogh", "painting"
FULL = reference_loop.Settings()
JOB_SHARE = 50
"""The measured job is this part of the published one: of its images, prompts, latents and steps."""
STEPS = 8
"""Optimizer steps of a run that measures the step; the first is not counted."""
LATENTS = fdu.EraseConfig().num_latents
REFERENCE_ONLY = ("num_images", "num_inference_steps", "copies", "dataloader_num_workers")
"""Settings of the reference that fdu does not have, or sets otherwise."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A loop, "reference" or "fdu", with the settings of the reference, which fdu shares."""

    loop: str
    shared: reference_loop.Settings
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further settings of fdu."""
    job: bool = False
    """Whether to measure the whole job with its sampling, instead of the step alone."""

    def config(self) -> fdu.EraseConfig:
        """The settings of fdu."""
        shared = {name: value for name, value in vars(self.shared).items() if name not in REFERENCE_ONLY}
        settings: dict[str, Any] = {
            "num_inference_steps": self.shared.num_inference_steps if self.job else 1,
            "num_latents": max(2, round(LATENTS / JOB_SHARE)) if self.job else 4,
            "train_method": "cross_attention",
            "divergence": "squared_hellinger",
            "sigma": 1.0,
            "lr_scheduler": "constant",
        }
        return fdu.EraseConfig(**shared, **settings, **self.own)

    @property
    def sampling_calls(self) -> int:
        """Calls of the denoiser that sample."""
        config = self.config()
        drawn = config.num_latents if self.loop == "fdu" else self.shared.num_images if self.job else 0
        return math.ceil(drawn / self.shared.sample_batch_size) * config.num_inference_steps


def a_step(steps: int = STEPS, batch: int = FULL.train_batch_size, **changes: Any) -> reference_loop.Settings:
    """The published settings with this number of steps and this batch."""
    images = {"max_train_steps": steps, "train_batch_size": batch, "num_images": steps * batch}
    return dataclasses.replace(FULL, **images, **changes)


STEP, PRESERVING = a_step(), a_step(preservation_weight=1.0)
PART = dataclasses.replace(
    FULL, num_images=FULL.num_images // JOB_SHARE, max_train_steps=FULL.max_train_steps // JOB_SHARE
)
# Half of the batches: each is used twice, as often as the published runs take each of their images.
KEPT = {"frozen_batches": STEPS * FULL.gradient_accumulation_steps // 2}
CHECKPOINTED = {"gradient_checkpointing": True}
RUNS = {
    "reference": Run("reference", STEP),
    "reference, without a copy": Run("reference", a_step(copies=False)),
    "fdu": Run("fdu", STEP),
    "fdu, frozen outputs kept": Run("fdu", STEP, KEPT),
    "fdu, checkpointed": Run("fdu", STEP, CHECKPOINTED),
    "fdu, frozen outputs kept, checkpointed": Run("fdu", STEP, {**KEPT, **CHECKPOINTED}),
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


def memory(field: str) -> float:
    """MiB that this process holds ("VmRSS") or has held at most ("VmHWM"), from Linux."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) / 1024


class Watch:
    """When the denoisers were called and the optimizer stepped, and the memory between the first and last step."""

    def __init__(self, denoiser: nn.Module, device: str) -> None:
        self.device = device
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
        self._forget()

    def _called(self) -> None:
        self.calls.append((Moment.now(), torch.is_grad_enabled()))

    def _stepped(self) -> None:
        peak = self._peak()
        self.steps.append(Moment.now())
        self.highest = max(self.highest, peak)
        if len(self.steps) == 1:
            self._forget()
        self.peak = self._peak()

    def _peak(self) -> float:
        """MiB since the last :meth:`_forget`; on a GPU, of tensors, once it has done its work."""
        if self.device != "cuda":
            return memory("VmHWM")
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20

    def _forget(self) -> None:
        """Start the peak again, without memory that is free."""
        if self.device == "cuda":
            return torch.cuda.reset_peak_memory_stats()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

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
    imported = torch.cuda.memory_allocated() / 2**20 if device == "cuda" else memory("VmRSS")
    pipeline = (build or shapes.sd15)()
    watch = Watch(pipeline.unet, device)
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
    else:
        side = pipeline.vae.config.sample_size
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        for number in range(run.shared.num_images):
            Image.fromarray(noise).save(reference_loop.image_path(folder, number))
    return reference_loop.train(pipeline, TARGET, prompts, folder, run.shared)


def ours(run: Run, pipeline: DiffusionPipeline, folder: Path) -> list[float]:
    """The loop of fdu."""
    prompts = shapes.anchor_prompts(200 // JOB_SHARE)
    texts = [template.format(prompt=one, target=TARGET) for template in reference_loop.TEMPLATES for one in prompts]
    target, anchor = fdu.Concept(TARGET, tuple(texts)), fdu.Concept(ANCHOR, (*prompts, *prompts))
    return fdu.erase(pipeline, target, anchor, config=run.config()).history["loss"]


def run_apart(name: str) -> Figures:
    """One run, in a process of its own."""
    # Threads that wait sleep: spinning would take the cores from those that compute.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--run", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_all(rounds: int) -> dict[str, Any]:
    """All runs in turn, and what the page says about them."""
    runs: dict[str, list[Figures]] = {name: [] for name in RUNS}
    for turn in range(rounds):
        for name, run in RUNS.items():
            if turn == 0 or not run.job:
                runs[name].append(run_apart(name))
                print(f"round {turn + 1}, {name}: {runs[name][-1]}", flush=True)
    return {
        "rounds": rounds,
        "job_share": JOB_SHARE,
        "latents": LATENTS,
        "job_latents": RUNS[promises.JOB].config().num_latents,
        "proportions": {"1": shapes.proportions(shapes.FULL), "scaled": shapes.proportions(shapes.SCALED)},
        "runs": runs,
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FILE", help="JSON file whose part of this suite to write")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--run", choices=RUNS, metavar="NAME", help=f"one of: {'; '.join(RUNS)}; prints its figures")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(RUNS[options.run])))
        return
    found = measure_all(options.rounds)
    promises.judge(promises.training(found))
    if options.record:
        records.keep(options.record, "training", **found)


if __name__ == "__main__":
    main()
