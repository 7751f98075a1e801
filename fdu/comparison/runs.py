"""The runs of a comparison as jobs of a sweep: erase, draw and judge, or judge the model as it is."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from fdu.comparison.front import ATTACKED, TARGET_ROLES, Judged
from fdu.comparison.plan import Comparison, Run, slug
from fdu.comparison.sweep import Job, Record, digest, settings_identity
from fdu.erasure import erase
from fdu.evaluation import JUDGED_SEED, Probe, draw
from fdu.evaluation.drawing import JudgedSampling
from fdu.evaluation.robustness.attack import AttackConfig, attack
from fdu.evaluation.robustness.relearning import Lesson, target_latents
from fdu.models.offloading import drawable
from fdu.report.pictures import strip
from fdu.result import ErasureResult
from fdu.storage.fingerprint import fingerprint, versions
from fdu.storage.integrity import read_sealed, sealed
from fdu.storage.output import whole_file
from fdu.subjects.registry import subject_of

BEFORE = "before"
"""Start of the names of records and images of the model as it is."""
SIDE = 64
"""Larger images are reduced to this many pixels before the change of retained ones is measured."""
PICTURED_TARGET, PICTURED_RETAINED = 6, 2
"""How many images of the target, and how many retained classes with one image each, are stored as pictures."""
PICTURED_HEIGHT = 128
"""Pixels; higher images are reduced to this in pictures."""
ATTACK, ATTACK_LATENTS = AttackConfig(looks=1), 32
"""The attack on an erased model, and how many images of the target it learns from."""
PICTURES = "pictures"
"""Name of the pictures in the cache of images before the erasure."""


def jobs(comparison: Comparison, cache: Path, pictures: Path | None = None) -> list[Job]:
    """One job per target for the model as it is, then one per run.

    Args:
        comparison: what to make.
        cache: a folder for latents, frozen outputs and images before the erasure.
        pictures: a folder for a few images of the model as it is, and of each run with the first seed: one PNG strip
            named like the record. None: no pictures.
    """
    before = [
        Job(
            before_name(target),
            identity_before(comparison, target),
            functools.partial(judge_before, target, comparison, cache, pictures),
            comparison.device,
            first=True,
        )
        for target, _ in comparison.pairs
    ]
    return before + [
        Job(
            run.name,
            identity_of(comparison, run),
            functools.partial(make_run, run, comparison, cache, pictures if run.seed == comparison.seeds[0] else None),
            comparison.device,
        )
        for run in comparison.runs()
    ]


def before_name(target: str) -> str:
    """The name of the record of the model as it is, for one target."""
    return f"{BEFORE}_{slug(target)}"


def identity_before(comparison: Comparison, target: str) -> Record:
    """Everything that the figures of the model as it is depend on except versions and device, ready for JSON."""
    concepts = comparison.exam(target).concepts  # a file of prompts may have changed under its name
    own = (concepts.seeds, concepts.guidance) if concepts else ()
    return {
        "target": target,
        **comparison.conditions(),
        "weights": weights(*comparison.loading),
        "concept_set": digest((concepts, *own) if any(own) else concepts) if concepts else None,
    }


def identity_of(comparison: Comparison, run: Run) -> Record:
    """Everything that a run's figures depend on except versions and device, ready for JSON."""
    erased: Record = {"anchor": run.anchor, "concept_type": comparison.concept_type}
    if comparison.attacked:
        erased["attack"] = {**dataclasses.asdict(ATTACK), "latents": ATTACK_LATENTS}
    settings = settings_identity(comparison.config(run))
    return {**identity_before(comparison, run.target), **erased, "settings": settings}


def judge_before(target: str, comparison: Comparison, cache: Path, pictures: Path | None = None) -> Record:
    """The judge's view of the model as it is, and class and prompt of each picture."""
    probes = _probes(comparison, target)
    before, strip_before = _before(comparison, target, probes, cache)
    if pictures is not None:
        _write_picture(pictures / picture_name(before_name(target)), strip_before)
    return {
        "judged": [judged(probe, drawn.float()).as_dict() for probe, drawn in zip(probes, before, strict=True)],
        "pictured": [
            [probe.name, probe.prompts[index % len(probe.prompts)]]
            for probe, count in zip(probes, _pictured(comparison, probes), strict=True)
            for index in range(count)
        ],
    }


def make_run(run: Run, comparison: Comparison, cache: Path, pictures: Path | None = None) -> Record:
    """Erase, draw and judge."""
    pipeline = _pipeline(*comparison.loading)
    probes = _probes(comparison, run.target)
    # Before the erasure: images that the cache lacks are drawn with this pipeline.
    before, _ = _before(comparison, run.target, probes, cache)
    began = time.process_time()
    config = dataclasses.replace(comparison.config(run), training_cache=str(cache))
    result = erase(pipeline, *comparison.pair(run.target), config=config)
    found, shown = [], []
    try:
        after, counts = _draw(comparison, pipeline, probes), _pictured(comparison, probes)
        for probe, drawn, images, count in zip(probes, after, before, counts, strict=True):
            found.append(judged(probe, drawn, images).as_dict())
            shown.append(drawn[:count].clone())
        if comparison.attacked:
            found.append(attacked(comparison, result, probes[0]).as_dict())
    finally:
        result.trainable.remove()
    if pictures is not None:
        _write_picture(pictures / picture_name(run.name), _strip(shown))
    return {
        "judged": found,
        "sigma": result.sigma,
        "seconds": round(result.seconds, 1),
        "distance": " ".join(f"{value:.4g}" for value in result.history.get("distance", ())),
        "core_seconds": round(time.process_time() - began, 1),
    }


def attacked(comparison: Comparison, result: ErasureResult, target: Probe) -> Judged:
    """The target's images under an attack on the erased model, which learns from images of the original one."""
    drawing = comparison.drawing
    seed = drawing.judged_seed - JUDGED_SEED  # so that the images start from the noise of those without an attack
    sampling = JudgedSampling(images=drawing.images_of_target, seed=max(seed, 0), **drawing.settings())
    with drawable(result.pipeline):
        with result.original():
            latents = target_latents(result.denoiser, target, ATTACK_LATENTS, sampling)
        found = attack(Lesson(result.denoiser, target, latents, sampling), ATTACK)
    return Judged(ATTACKED, target.name, found.attempts[found.chosen].hits)


def picture_name(record: str) -> str:
    """The file of the pictures of a record."""
    return f"{record}.png"


def _pictured(comparison: Comparison, probes: list[Probe]) -> list[int]:
    """How many of each probe's images become pictures: several of the target, one of each of the first retained."""
    retained = [place for place, probe in enumerate(probes) if probe.role == "retained"][:PICTURED_RETAINED]
    of_target = min(PICTURED_TARGET, comparison.drawing.images_of_target)
    return [of_target if probe.role == "target" else int(place in retained) for place, probe in enumerate(probes)]


def _strip(images: list[Tensor]) -> Tensor:
    """Images side by side, [h, w, 3] in uint8."""
    return torch.from_numpy(np.array(strip(torch.cat(images), gap=0, height=PICTURED_HEIGHT).convert("RGB")))


def _write_picture(path: Path, pixels: Tensor) -> None:
    with whole_file(path) as fresh:
        Image.fromarray(pixels.numpy()).save(fresh, "PNG", optimize=True)


def judged(probe: Probe, images: Tensor, before: Tensor | None = None) -> Judged:
    """The judge's view of a probe's images.

    Args:
        probe: the requested class, and its judge.
        images: [N, 3, H, W] in [0, 1].
        before: the same images before the erasure, as :func:`small` makes them.
    """
    hits = tuple(name == probe.name for name in probe.judge(images))
    asking = probe.attributes if probe.role in TARGET_ROLES else ()
    attributes = {one.name: one.found(images) for one in asking}
    change = None
    if before is not None:
        change = tuple((small(images).float() - before.float()).abs().mean((1, 2, 3)).tolist())
    return Judged(probe.role, probe.name, hits, change, attributes)


def small(images: Tensor) -> Tensor:
    """Images as they are stored for comparison: [N, 3, h, w] in float16, h and w at most ``SIDE``."""
    height, width = images.shape[-2:]
    if max(height, width) > SIDE:
        scale = SIDE / max(height, width)
        images = functional.interpolate(images, (round(height * scale), round(width * scale)), mode="area")
    return images.half()


def _probes(comparison: Comparison, target: str) -> list[Probe]:
    return comparison.exam(target).panel(comparison.device).probes


def _draw(comparison: Comparison, pipeline: DiffusionPipeline, probes: Sequence[Probe]) -> Iterator[Tensor]:
    """The images of one probe after the other; no more than a batch, or one probe's, are in memory."""
    drawing = comparison.drawing
    for asking, group in itertools.groupby(probes, lambda probe: probe.role in TARGET_ROLES):
        count = drawing.images_of_target if asking else drawing.images_per_class
        together = max(drawing.batch_size // count, 1)
        some = list(group)
        for start in range(0, len(some), together):
            yield from draw(
                pipeline,
                some[start : start + together],
                count,
                drawing.judged_seed,
                **drawing.settings(),
                description=f"{some[start].role}: {some[start].name}" if asking else "retained",
            ).images


def _before(comparison: Comparison, target: str, probes: list[Probe], cache: Path) -> tuple[list[Tensor], Tensor]:
    """Each probe's images before the erasure, as :func:`small` makes them, and their pictures; from the cache if there.

    The pictures from a cache of an earlier version are as small as its images.
    """
    key = {
        **identity_before(comparison, target),
        "prompts": [probe.prompts for probe in probes],
        "versions": [versions().get(name) for name in ("torch", "diffusers", "transformers")],
    }
    path = cache / f"{BEFORE}-{digest(json.dumps(key, sort_keys=True))}.safetensors"
    counts = _pictured(comparison, probes)
    found: dict[str, Tensor] = {}
    with suppress(OSError, ValueError):  # there is none yet, or it is damaged and made again
        found, _ = read_sealed(path)
    if not found.keys() >= {str(place) for place in range(len(probes))}:
        pipeline = _pipeline(*comparison.loading)
        found, shown = {}, []
        for place, (drawn, count) in enumerate(zip(_draw(comparison, pipeline, probes), counts, strict=True)):
            found[str(place)] = small(drawn)
            shown.append(drawn[:count].clone())
        found[PICTURES] = _strip(shown)
        with whole_file(path) as fresh:
            save_file(found, fresh, sealed(found, {}))
    images = [found[str(place)] for place in range(len(probes))]
    if PICTURES not in found:
        found[PICTURES] = _strip([one[:count].float() for one, count in zip(images, counts, strict=True)])
    return images, found[PICTURES]


@functools.cache
def _pipeline(model: str, *loading: Any) -> DiffusionPipeline:
    """The pipeline of this process; every run leaves it as it was. ``loading``: as :meth:`Subject.load` takes it."""
    return subject_of(model).load(*loading)


@functools.cache
def weights(model: str, dtype: str = "float32", device: str = "cpu", *others: Any) -> str:
    """The first digits of the fingerprint of the model as it is, with its LoRAs."""
    if device == "cuda" and not torch.cuda.is_available():  # the machines that make the runs have it
        device = "cpu"
    return fingerprint(_pipeline(model, dtype, device, *others), adapters=True)[:16]
