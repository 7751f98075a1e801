"""The training step on a GPU: ``python benchmarks/gpu_training.py sd15``, or "sdxl" or "compiled".

A row is a run of bench_training.py, fdu's loop or the reference loop, at the full shape of Stable Diffusion 1.5 or XL,
with random weights and one batch per step. The published loops' batch of two in bf16 comes first, then other settings
of fdu, fp32, and batches from one to what fits. torch.compile takes minutes, so it is a section of its own. With
``--rehearsal`` a toy model trains on the CPU.
"""

from __future__ import annotations

import functools
import gc
import itertools
import os
from typing import Any, NamedTuple

import gpu_losses
import records
import shapes
import torch
from bench_training import CHECKPOINTED, Run, a_step, measure
from diffusers import DiffusionPipeline
from records import Row, Rows

import fdu_kernels as fk

STEPS, TOY_STEPS = 6, 2
"""Optimizer steps of a run; the first is not counted."""
KEPT = {"frozen_batches": STEPS // 2}
BATCHES = (1, 4, 8, 16, 32, 64)
TOYS = {"sd15": shapes.Scale(16, 8, 64), "sdxl": shapes.Scale(16, 16, 64)}
MODELS = {"sd15": shapes.sd15, "sdxl": shapes.sdxl}
LATENTS = {"sd15": (4, 64, 64), "sdxl": (4, 128, 128)}
BEST = "fdu, frozen outputs kept, bf16 weights"


class Variant(NamedTuple):
    """One way to train."""

    name: str
    run: Run
    half_weights: bool = False
    """Whether the frozen weights are in bf16, which the trained ones never are."""


def variant(
    name: str, own: Row | None = None, half_weights: bool = False, precision: str = "bf16", **changes: Any
) -> Variant:
    """Train with the loop that begins the name; two processes load the reference's images, as in concept ablation."""
    options = {"steps": STEPS, "dataloader_num_workers": 2, **changes}
    shared = a_step(gradient_accumulation_steps=1, mixed_precision=precision, **options)
    return Variant(name, Run(name.replace(",", "").split()[0], shared, own or {}), half_weights)


def variants() -> list[Variant]:
    """All that is measured of each model, in order."""
    found = [
        variant("reference"),
        variant(BEST, KEPT, half_weights=True),
        variant("fdu"),
        variant("reference without a copy", copies=False),
        variant("fdu, frozen outputs kept", KEPT),
        variant(f"{BEST}, checkpointed", {**KEPT, **CHECKPOINTED}, half_weights=True),
        variant("reference", precision="no"),
        variant("fdu, frozen outputs kept", KEPT, precision="no"),
    ]
    for batch in BATCHES:
        found += [variant("reference", batch=batch), variant(BEST, KEPT, half_weights=True, batch=batch)]
    return found


def measure_variants(model: str, wanted: list[Variant], rows: Rows, least: float = 4.0) -> None:
    """A row for each; a variant that was out of memory is not tried with larger batches."""
    full: set[str] = set()
    for one in wanted:
        if one.name in full:
            continue
        shared = one.run.shared
        row = {"model": model, "name": one.name, "precision": shared.mixed_precision, "batch": shared.train_batch_size}
        rows.add(row, functools.partial(figures_of, model, one, rows), least)
        if "OutOfMemory" in row.get("error", ""):
            full.add(one.name)
        gc.collect()
        if rows.device == "cuda":
            torch.cuda.empty_cache()


def figures_of(model: str, one: Variant, rows: Rows) -> Row:
    """Seconds per step, MiB at the peak, and microseconds of the loss alone, forward and backward."""
    figures = measure(one.run, functools.partial(build, model, one, rows), rows.device)
    shape = (one.run.shared.train_batch_size, *LATENTS[model])
    predicted, wanted = (torch.randn(shape, device=rows.device, requires_grad=first) for first in (True, False))

    def loss(pred: torch.Tensor, target: torch.Tensor) -> Any:
        return torch.autograd.grad(fk.gaussian_divergence(pred, target), pred)

    loss_us = gpu_losses.wall_us(loss, itertools.repeat((predicted, wanted)), 5, rows.device, repeats=3)
    return {"step_s": figures["wall_step"], "peak_mib": figures["peak"], "loss_us": loss_us}


def build(model: str, one: Variant, rows: Rows) -> DiffusionPipeline:
    """The pipeline on the device, at full shape unless this is a rehearsal."""
    pipeline = MODELS[model](TOYS[model] if rows.rehearsal else shapes.FULL, rows.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.bfloat16) if one.half_weights else pipeline


def train(model: str, rows: Rows) -> None:
    """All variants of a model, or two of them in a rehearsal."""
    wanted = variants()
    if rows.rehearsal:
        toy: dict[str, Any] = {"precision": "no", "steps": TOY_STEPS, "dataloader_num_workers": 0}
        wanted = [variant("reference", **toy), variant("fdu, frozen outputs kept", KEPT, **toy)]
        os.environ["FDU_BACKEND"] = "cpu"  # interpreted, the Triton kernels would take most of the time
    measure_variants(model, wanted, rows)


def compiled(rows: Rows) -> None:
    """Stable Diffusion 1.5 under torch.compile."""
    own = {**KEPT, "compile": True}
    measure_variants("sd15", [variant(f"{BEST}, compiled", own, half_weights=True)], rows, least=0.0)


SECTIONS = {model: functools.partial(train, model) for model in MODELS} | {"compiled": compiled}

if __name__ == "__main__":
    records.run_section(SECTIONS)
