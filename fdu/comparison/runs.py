"""The runs of a comparison as jobs of a sweep: erase, draw and judge, or judge the model as it is."""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdu.comparison import judged as judging
from fdu.comparison.plan import Comparison, Run, slug
from fdu.comparison.sweep import Job, Record, Records, digest, settings_identity
from fdu.config import PLACES, EraseConfig
from fdu.erasure import erase
from fdu.evaluation import Probe, draw
from fdu.storage.fingerprint import fingerprint, versions
from fdu.storage.output import whole_file
from fdu.subjects.registry import subject_of

BEFORE = "before"
"""What the names of records, and of images, of the model as it is begin with."""


def jobs(comparison: Comparison, cache: Path) -> list[Job]:
    """One job per target for the model as it is, then one per run.

    Args:
        comparison: what to make.
        cache: a folder for latents, frozen outputs and images before the erasure.
    """
    before = [
        Job(
            before_name(target),
            _identity_before(comparison, target),
            functools.partial(judge_before, target, comparison, cache),
            comparison.device,
            first=True,
        )
        for target, _ in comparison.pairs
    ]
    return before + [
        Job(
            run.name,
            identity_of(comparison, run),
            functools.partial(make_run, run, comparison, cache),
            comparison.device,
        )
        for run in comparison.runs()
    ]


def before_name(target: str) -> str:
    """The name of the record of the model as it is, for one target."""
    return f"{BEFORE}_{slug(target)}"


def read_record(comparison: Comparison, records: Records, run: Run) -> Record | None:
    """The record of a run if it has today's settings, model and drawing, else None."""
    return records.of(run.name, identity_of(comparison, run))


def read_before(comparison: Comparison, records: Records, target: str) -> Record | None:
    """The record of the model as it is, for one target; None if it has to be made."""
    return records.of(before_name(target), _identity_before(comparison, target))


def identity_of(comparison: Comparison, run: Run) -> Record:
    """Everything that a run's figures depend on except versions and device, ready for JSON."""
    settings = settings_identity(settings_of(comparison, run), without=PLACES)
    return {**comparison.identity(run), "settings": settings, **_asked(comparison, run.target)}


def judge_before(target: str, comparison: Comparison, cache: Path) -> Record:
    """The judge's view of the model as it is."""
    probes = judging.probes(comparison, target)
    images = _before(comparison, target, cache)
    judged = [judging.judge(probe, drawn.float()).as_dict() for probe, drawn in zip(probes, images, strict=True)]
    return {"judged": judged}


def make_run(run: Run, comparison: Comparison, cache: Path) -> Record:
    """Erase, draw and judge."""
    pipeline = _pipeline(comparison.model, comparison.dtype, comparison.device)
    target, anchor = judging.concepts(comparison, run.target, run.anchor)
    # Now, and not when they are compared: what the cache lacks is drawn with this pipeline, as it is until erase().
    before = _before(comparison, run.target, cache)
    began = time.process_time()
    config = dataclasses.replace(settings_of(comparison, run), cache_dir=str(cache))
    result = erase(pipeline, target, anchor, config=config)
    try:
        judged = _judged(comparison, run.target, pipeline, before)
    finally:
        result.trainable.remove()
    return {
        "judged": judged,
        "sigma": result.sigma,
        "seconds": round(result.seconds, 1),
        "distance": " ".join(f"{value:.4g}" for value in result.history["distance"]),
        "core_seconds": round(time.process_time() - began, 1),
    }


def settings_of(comparison: Comparison, run: Run) -> EraseConfig:
    """:meth:`Comparison.config` with the model's own prompts to preserve."""
    return judging.with_preserved(comparison, run.target, comparison.config(run))


def _judged(
    comparison: Comparison, target: str, pipeline: DiffusionPipeline, before: list[Tensor]
) -> list[dict[str, Any]]:
    """The judge's view of all probes, one after the other: their images are not needed together."""
    return [
        judging.judge(probe, _draw(comparison, pipeline, probe), images).as_dict()
        for probe, images in zip(judging.probes(comparison, target), before, strict=True)
    ]


def _draw(comparison: Comparison, pipeline: DiffusionPipeline, probe: Probe) -> Tensor:
    drawing = comparison.drawing
    (images,) = draw(
        pipeline,
        [probe],
        drawing.images_of_target if probe.role in ("target", "unseen") else drawing.images_per_class,
        drawing.judged_seed,
        **drawing.settings(),
        description=f"{probe.role}: {probe.name}",
    ).images
    return images


def _before(comparison: Comparison, target: str, cache: Path) -> list[Tensor]:
    """The images of every probe before the erasure, as they are compared; from the cache if they are there."""
    probes = judging.probes(comparison, target)
    key = {
        **_identity_before(comparison, target),
        "prompts": [probe.prompts for probe in probes],
        "versions": [versions().get(name) for name in ("torch", "diffusers", "transformers")],
    }
    path = cache / f"{BEFORE}-{digest(json.dumps(key, sort_keys=True))}.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        pipeline = _pipeline(comparison.model, comparison.dtype, comparison.device)
        found = {str(place): judging.small(_draw(comparison, pipeline, probe)) for place, probe in enumerate(probes)}
        with whole_file(path) as fresh:
            save_file(found, fresh)
    return [found[str(place)] for place in range(len(probes))]


def _identity_before(comparison: Comparison, target: str) -> Record:
    return {"target": target, **comparison.conditions(), **_asked(comparison, target)}


def _asked(comparison: Comparison, target: str) -> Record:
    """Of which model, and what is drawn: a file of prompts may have changed under its name."""
    weights_now = weights(comparison.model, comparison.dtype, comparison.device)
    concepts = judging.exam(comparison, target).concepts
    return {"weights": weights_now, "concept_set": digest(concepts) if concepts else None}


@functools.cache
def _pipeline(model: str, dtype: str, device: str) -> DiffusionPipeline:
    """The pipeline of this process; runs leave it as they found it."""
    return subject_of(model).load(dtype, device)


@functools.cache
def weights(model: str, dtype: str = "float32", device: str = "cpu") -> str:
    """The first digits of the fingerprint of the model as it is."""
    return fingerprint(_pipeline(model, dtype, device))[:16]
