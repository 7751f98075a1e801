"""The training step at full shape on a GPU: fdu's loop against the reference loop, in time and in memory.

Stable Diffusion 1.5 and XL with random weights. A row is a run of training_runs.py with one batch a step: seconds a
step, images a second, MiB at the peak. What is compared first comes first: the published loops' batch of two in bf16,
then the ways of fdu, then fp32, and batches from one to what fits. torch.compile, which takes minutes, is a section by
itself.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

import sd15_shape
import sdxl_shape
import torch
from diffusers import DiffusionPipeline
from gpu_timing import Plan, wall_us
from training_runs import CHECKPOINTED, DeviceMemory, HostMemory, Run, measure

import fdu_kernels as fk

STEPS, TOY_STEPS = 6, 2
"""Optimizer steps of a run; the first is not counted."""
KEPT = ("frozen_batches", STEPS // 2)
BATCHES = (1, 4, 8, 16, 32, 64)
TOY = {"sd15": {"width": 16, "side": 8, "text_width": 64}, "sdxl": {"width": 16, "side": 16, "text_width": 64}}
WORKERS = 2
"""Processes that load the reference's images, as in concept ablation."""
MODELS: dict[str, Callable[..., DiffusionPipeline]] = {"sd15": sd15_shape.build, "sdxl": sdxl_shape.build}
LATENTS = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128)}
Settings = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to train."""

    name: str
    loop: str
    precision: str = "bf16"
    half_weights: bool = False
    """Whether the frozen weights are in bf16, which the trained ones never are."""
    settings: Settings = ()
    batch: int = 2
    steps: int = STEPS
    workers: int = WORKERS
    copies: bool = True
    least: float = 4.0
    """Seconds that must be left for it to be begun."""

    @property
    def run(self) -> Run:
        """How training_runs.py makes it."""
        return Run(
            self.loop, "step", self.settings, batch=self.batch, accumulation=1, precision=self.precision,
            steps=self.steps, workers=self.workers, copies=self.copies,
        )  # fmt: skip


BEST = Row("fdu, frozen outputs kept, bf16 weights", "fdu", half_weights=True, settings=(KEPT,))


def rows() -> list[Row]:
    """What is measured of each model, in order."""
    reference = Row("reference", "reference")
    return [
        reference,
        BEST,
        Row("fdu", "fdu"),
        Row("reference without a copy", "reference", copies=False),
        Row("fdu, frozen outputs kept", "fdu", settings=(KEPT,)),
        dataclasses.replace(BEST, name=f"{BEST.name}, checkpointed", settings=(KEPT, CHECKPOINTED)),
        Row("reference", "reference", "no"),
        Row("fdu, frozen outputs kept", "fdu", "no", settings=(KEPT,)),
        *(dataclasses.replace(row, batch=batch) for batch in BATCHES for row in (reference, BEST)),
    ]


def train(model: str, plan: Plan) -> None:
    """All rows of a model."""
    wanted = rows()
    if plan.rehearsal:
        os.environ["FDU_BACKEND"] = "cpu"  # interpreted, the Triton kernels would take most of the time
        toy = {"precision": "no", "half_weights": False, "steps": TOY_STEPS, "workers": 0, "least": 0.0}
        wanted = [dataclasses.replace(row, **toy) for row in (wanted[0], wanted[4])]
    measure_rows(model, plan, wanted)


def measure_rows(model: str, plan: Plan, wanted: list[Row]) -> None:
    """As many as time and memory allow; none is begun that would take longer than there is, if it takes a little longer
    than the longest before it."""
    found: list[dict[str, Any]] = []
    full: set[str] = set()
    longest = 0.0
    for number, row in enumerate(wanted):
        if plan.left() < max(row.least, 1.2 * longest):
            return plan.keep({"complete": False, "left_out": len(wanted) - number, "rows": found})
        if row.name not in full:
            began = time.monotonic()
            figures = measured(model, row, plan)
            longest = max(longest, time.monotonic() - began)
            if "OutOfMemory" in figures.get("error", ""):
                full.add(row.name)
            found.append(figures)
            plan.keep({"complete": False, "left_out": len(wanted) - number - 1, "rows": found})
    return plan.keep({"complete": True, "left_out": 0, "rows": found})


def measured(model: str, row: Row, plan: Plan) -> dict[str, Any]:
    """One row's figures, or why there are none."""
    noted: dict[str, Any] = {
        "model": model, "name": row.name, "loop": row.loop, "precision": row.precision, "batch": row.batch,
        "kept": KEPT in row.settings,
    }  # fmt: skip
    memory = HostMemory() if plan.rehearsal else DeviceMemory()
    try:
        figures = measure(row.run, functools.partial(build, model, row, plan), memory)
        noted["loss_us"] = loss_us(model, row, plan)
        noted["images_per_s"] = row.batch / figures["wall_step"]
        noted.update(step_s=figures["wall_step"], peak_mib=figures["peak"])
    except Exception as error:  # out of memory, or what does not run on this device: the other rows may
        noted["error"] = f"{type(error).__name__}: {error}"[:300]
    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    return noted


def build(model: str, row: Row, plan: Plan) -> DiffusionPipeline:
    """The pipeline of a row, on the device."""
    pipeline = MODELS[model](device=plan.device, **(TOY[model] if plan.rehearsal else {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.bfloat16) if row.half_weights else pipeline


def loss_us(model: str, row: Row, plan: Plan) -> float:
    """Microseconds of the loss alone, forward and backward, on outputs of this batch."""
    shape = (row.batch, *LATENTS[model])
    predicted, wanted = (torch.randn(shape, device=plan.device) for _ in range(2))
    leaf = predicted.requires_grad_()

    def run(pred: torch.Tensor, target: torch.Tensor) -> object:
        return torch.autograd.grad(fk.gaussian_divergence(pred, target), pred)

    return wall_us(run, itertools.repeat((leaf, wanted)), 5, plan.device, repeats=3)


def sd15(plan: Plan) -> None:
    """Stable Diffusion 1.5."""
    train("sd15", plan)


def sdxl(plan: Plan) -> None:
    """Stable Diffusion XL."""
    train("sdxl", plan)


def compiled(plan: Plan) -> None:
    """Stable Diffusion 1.5 by torch.compile."""
    row = dataclasses.replace(BEST, name=f"{BEST.name}, compiled", settings=(KEPT, ("compile", True)), least=0.0)
    measure_rows("sd15", plan, [row])
