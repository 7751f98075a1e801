"""Run a comparison, one record per run. Finished runs are not repeated, and a kill loses at most one run."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdu.comparison import judged as subject
from fdu.comparison.plan import Comparison, Run, slug
from fdu.config import EraseConfig
from fdu.erasure import erase
from fdu.evaluation import Probe, draw
from fdu.storage.fingerprint import fingerprint
from fdu.storage.loading import describe_device
from fdu.storage.output import whole_file, write_json
from fdu.storage.versions import versions
from fdu.subjects.registry import subject_of
from fdu.training.loop import NotFinite

BEFORE = "before"
"""What the names of records, and of images, of the model as it is begin with."""

WORKER = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""For processes that share the cores: threads that spin for work are worse than none; bars and notices would mix."""

Record = dict[str, Any]


def make_runs(
    comparison: Comparison,
    records: Path,
    cache: Path,
    workers: int = 1,
    most: int | None = None,
    tell: Callable[[str], None] = print,
) -> None:
    """Make the records that are missing: first those of the model as it is, then those of the runs.

    A run whose loss became NaN or infinite leaves a record that says so, and is not made again either.

    Args:
        comparison: what to make.
        records: a folder for a JSON file a run.
        cache: a folder for latents, frozen outputs and images before the erasure.
        workers: processes, of one thread each if there are several.
        most: make at most so many runs in this call.
        tell: gets a line a record.

    Raises:
        OSError: a record cannot be written.
        KeyboardInterrupt: asked by a signal; what is written stays.
    """
    runs = [run for run in comparison.runs() if read_record(comparison, records, run) is None][:most]
    targets = [target for target, _ in comparison.pairs if read_before(comparison, records, target) is None]
    jobs: list[list[tuple[Callable[..., None], Any, str]]] = [
        [(make_before, target, f"{target} before") for target in targets],
        [(make_run, run, run.name) for run in runs],
    ]
    total, done = len(targets) + len(runs), 0
    shared = (comparison, records, cache)
    if workers == 1:
        for function, given, name in [*jobs[0], *jobs[1]]:
            function(given, *shared)
            done += 1
            tell(f"{done}/{total} {name}")
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)
    try:
        for part in jobs:
            with _environment(WORKER):  # the processes start with what is submitted
                futures = {pool.submit(function, given, *shared): name for function, given, name in part}
            for future in concurrent.futures.as_completed(futures):
                future.result()
                done += 1
                tell(f"{done}/{total} {futures[future]}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def make_before(target: str, comparison: Comparison, records: Path, cache: Path) -> None:
    """Judge the model as it is, and keep the images for the runs to come."""
    probes = subject.probes(comparison, target)
    images = _before(comparison, target, cache)
    judged = [subject.judge(probe, drawn.float()).as_dict() for probe, drawn in zip(probes, images, strict=True)]
    identity = _identity_before(comparison, target)
    write_json(_path_before(records, target), {"identity": identity, "judged": judged, **_conditions(comparison)})


def make_run(run: Run, comparison: Comparison, records: Path, cache: Path) -> None:
    """Erase, draw, judge, and write the record."""
    pipeline = _pipeline(comparison.model, comparison.dtype, comparison.device)
    target, anchor = subject.concepts(comparison, run.target, run.anchor)
    record: Record = {"identity": identity_of(comparison, run)}
    # Now, and not when they are compared: what the cache lacks is drawn with this pipeline, as it is until erase().
    before = _before(comparison, run.target, cache)
    began = time.process_time()
    try:
        config = dataclasses.replace(settings_of(comparison, run), cache_dir=str(cache))
        result = erase(pipeline, target, anchor, config=config)
    except NotFinite as error:
        record["failed"] = str(error).split(";")[0]
    else:
        try:
            record["judged"] = _judged(comparison, run.target, pipeline, before)
        finally:
            result.trainable.remove()
        course = " ".join(f"{value:.4g}" for value in result.history["distance"])
        record |= {"sigma": result.sigma, "seconds": round(result.seconds, 1), "distance": course}
    record["core_seconds"] = round(time.process_time() - began, 1)
    write_json(records / f"{run.name}.json", {**record, **_conditions(comparison)})


def settings_of(comparison: Comparison, run: Run) -> EraseConfig:
    """:meth:`Comparison.config` with the model's own prompts to keep."""
    return subject.with_preserved(comparison, run.target, comparison.config(run))


def identity_of(comparison: Comparison, run: Run) -> dict[str, Any]:
    """All that a run's figures depend on but versions and machine, ready for JSON."""
    return {**comparison.identity(run, settings_of(comparison, run)), **_asked(comparison, run.target)}


def read_record(comparison: Comparison, records: Path, run: Run) -> Record | None:
    """The record of a run with the settings, the model and the drawing of now; None if it has to be made."""
    record = _read(records / f"{run.name}.json")
    if record is None:
        return None
    wanted = json.loads(json.dumps(identity_of(comparison, run)))
    found = record.get("identity", {})
    # A setting that a record lacks did not exist when it was made: its default is what was done before.
    settings = {**EraseConfig().as_dict(), **found.get("settings", {})}
    found = {**found, "settings": {name: settings[name] for name in wanted["settings"]}}
    return record if found == wanted else None


def read_before(comparison: Comparison, records: Path, target: str) -> Record | None:
    """The record of the model as it is, for one target; None if it has to be made."""
    record = _read(_path_before(records, target))
    return record if record and record.get("identity") == _identity_before(comparison, target) else None


def _conditions(comparison: Comparison) -> dict[str, Any]:
    """What a record notes beside its figures."""
    return {"device": describe_device(comparison.device), "versions": versions()}


def _judged(
    comparison: Comparison, target: str, pipeline: DiffusionPipeline, before: list[Tensor]
) -> list[dict[str, Any]]:
    """The judge's view of all probes, one after the other: their images are not needed together."""
    return [
        subject.judge(probe, _draw(comparison, pipeline, probe), images).as_dict()
        for probe, images in zip(subject.probes(comparison, target), before, strict=True)
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
    probes = subject.probes(comparison, target)
    key = {
        **_identity_before(comparison, target),
        "prompts": [probe.prompts for probe in probes],
        "versions": [versions().get(name) for name in ("torch", "diffusers", "transformers")],
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{BEFORE}-{digest}.safetensors"
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        pipeline = _pipeline(comparison.model, comparison.dtype, comparison.device)
        found = {str(place): subject.small(_draw(comparison, pipeline, probe)) for place, probe in enumerate(probes)}
        with whole_file(path) as fresh:
            save_file(found, fresh)
    return [found[str(place)] for place in range(len(probes))]


def _identity_before(comparison: Comparison, target: str) -> dict[str, Any]:
    return {"target": target, **comparison.conditions(), **_asked(comparison, target)}


def _asked(comparison: Comparison, target: str) -> dict[str, Any]:
    """Of which model, and what is drawn: a file of prompts may have changed under its name."""
    return {"weights": _weights_of(comparison), "concept_set": subject.exam(comparison, target).digest}


def _path_before(records: Path, target: str) -> Path:
    return records / f"{BEFORE}_{slug(target)}.json"


def _weights_of(comparison: Comparison) -> str:
    return _weights(comparison.model, comparison.dtype, comparison.device)


@functools.cache
def _pipeline(model: str, dtype: str, device: str) -> DiffusionPipeline:
    """The pipeline of this process; runs leave it as they found it."""
    return subject_of(model).load(dtype, device)


@functools.cache
def _weights(model: str, dtype: str, device: str) -> str:
    """The first digits of the fingerprint of the model as it is."""
    return fingerprint(_pipeline(model, dtype, device))[:16]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within this context the environment holds these variables, too."""
    kept = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _read(path: Path) -> Record | None:
    """A record; None if there is none, or none that can be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None
