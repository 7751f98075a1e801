"""The training step at full shape on a GPU: fdu's loop against the reference loop, in time and in memory.

Stable Diffusion 1.5 and XL with random weights. A row is a run of bench_training.py, one batch per step: seconds per
step, images per second, MiB at the peak. What is compared first comes first: the published loops' batch of two in bf16,
then the ways of fdu, then fp32, and batches from one to what fits. torch.compile, which takes minutes, is a section by
itself.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
from typing import Any, NamedTuple

import gpu_timing
import shapes
import torch
from bench_training import CHECKPOINTED, Run, a_step, measure
from diffusers import DiffusionPipeline
from gpu_timing import Plan, wall_us

import fdu_kernels as fk

STEPS, TOY_STEPS = 6, 2
"""Optimizer steps of a run; the first is not counted."""
KEPT = ("frozen_batches", STEPS // 2)
BATCHES = (1, 4, 8, 16, 32, 64)
TOY = {"sd15": {"width": 16, "side": 8, "text_width": 64}, "sdxl": {"width": 16, "side": 16, "text_width": 64}}
MODELS = {"sd15": shapes.sd15, "sdxl": shapes.sdxl}
LATENTS = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128)}
LEAST = 4.0
"""Seconds that must be left for a row to be begun."""
WORKERS = 2
"""Processes that load the reference's images, as in concept ablation."""


class Row(NamedTuple):
    """One way to train."""

    name: str
    run: Run
    half_weights: bool = False
    """Whether the frozen weights are in bf16, which the trained ones never are."""


def row(name: str, *own: tuple[str, Any], half_weights: bool = False, precision: str = "bf16", **changes: Any) -> Row:
    """Of the loop that begins its name, with one batch per step."""
    options = {"steps": STEPS, "dataloader_num_workers": WORKERS, **changes}
    shared = a_step(gradient_accumulation_steps=1, mixed_precision=precision, **options)
    return Row(name, Run(name.partition(" ")[0].rstrip(","), shared, own), half_weights)


BEST = "fdu, frozen outputs kept, bf16 weights"


def rows() -> list[Row]:
    """What is measured of each model, in order."""
    return [
        row("reference"),
        row(BEST, KEPT, half_weights=True),
        row("fdu"),
        row("reference without a copy", copies=False),
        row("fdu, frozen outputs kept", KEPT),
        row(f"{BEST}, checkpointed", KEPT, CHECKPOINTED, half_weights=True),
        row("reference", precision="no"),
        row("fdu, frozen outputs kept", KEPT, precision="no"),
        *(
            one
            for batch in BATCHES
            for one in (row("reference", batch=batch), row(BEST, KEPT, half_weights=True, batch=batch))
        ),
    ]


def toy_rows() -> list[Row]:
    """What a rehearsal measures."""
    toy: dict[str, Any] = {"precision": "no", "steps": TOY_STEPS, "dataloader_num_workers": 0}
    return [row("reference", **toy), row("fdu, frozen outputs kept", KEPT, **toy)]


def measure_rows(model: str, plan: Plan, wanted: list[Row], least: float = LEAST) -> None:
    """As many rows as time and memory allow; larger batches of what was out of memory are not tried."""
    full: set[str] = set()
    for one in wanted:
        if one.name in full:
            continue
        if not plan.may_begin(least):
            plan.left_out.append([one.name, one.run.shared.mixed_precision, one.run.shared.train_batch_size])
            continue
        noted = {
            "model": model, "name": one.name, "loop": one.run.loop, "precision": one.run.shared.mixed_precision,
            "batch": one.run.shared.train_batch_size, "kept": KEPT in one.run.own,
        }  # fmt: skip
        plan.add(noted, functools.partial(figures_of, model, one, plan))
        if "OutOfMemory" in noted.get("error", ""):
            full.add(one.name)
        gc.collect()
        if plan.device == "cuda":
            torch.cuda.empty_cache()
    plan.keep()


def figures_of(model: str, one: Row, plan: Plan) -> dict[str, Any]:
    """Those of a row."""
    batch = one.run.shared.train_batch_size
    figures = measure(one.run, functools.partial(build, model, one, plan), plan.device)
    return {
        "loss_us": loss_us((batch, *LATENTS[model]), plan),
        "images_per_s": batch / figures["wall_step"],
        "step_s": figures["wall_step"],
        "peak_mib": figures["peak"],
    }


def build(model: str, one: Row, plan: Plan) -> DiffusionPipeline:
    """The pipeline of a row, at full shape, on the device."""
    shape = TOY[model] if plan.rehearsal else {"width": 1, "side": 1, "text_width": 1}
    pipeline = MODELS[model](**shape, device=plan.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.bfloat16) if one.half_weights else pipeline


def loss_us(shape: tuple[int, ...], plan: Plan) -> float:
    """Microseconds of the loss alone, forward and backward, on outputs of this shape."""
    predicted, wanted = (torch.randn(shape, device=plan.device) for _ in range(2))

    def run(pred: torch.Tensor, target: torch.Tensor) -> object:
        return torch.autograd.grad(fk.gaussian_divergence(pred, target), pred)

    return wall_us(run, itertools.repeat((predicted.requires_grad_(), wanted)), 5, plan.device, repeats=3)


def train(model: str, plan: Plan) -> None:
    """All rows of a model."""
    if plan.rehearsal:
        os.environ["FDU_BACKEND"] = "cpu"  # interpreted, the Triton kernels would take most of the time
    measure_rows(model, plan, toy_rows() if plan.rehearsal else rows())


def compiled(plan: Plan) -> None:
    """Stable Diffusion 1.5 by torch.compile."""
    measure_rows("sd15", plan, [row(f"{BEST}, compiled", KEPT, ("compile", True), half_weights=True)], least=0.0)


if __name__ == "__main__":
    gpu_timing.main({**{model: functools.partial(train, model) for model in MODELS}, "compiled": compiled})
