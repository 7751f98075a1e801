"""An evaluated run: the content of its report, written to a folder, read from it, and checked."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fdu.config import EraseConfig, trains
from fdu.evaluation import Draws, Evaluation, Probe, Sampling
from fdu.evaluation.drawing import Group, Role, check_probes
from fdu.evaluation.robustness import Robustness
from fdu.evaluation.verdict import counted_names
from fdu.report.pictures import strip
from fdu.report.stored import restored
from fdu.storage.fingerprint import versions
from fdu.storage.foreign import printable, read_json
from fdu.storage.loading import erased_pairs
from fdu.storage.output import METRICS_FILE, METRICS_KEYS, RECORD_FILE, write_json
from fdu.training.closed_form import EditFigures

IMAGES_FOLDER = "images"
"""Folder with the shown images, next to the metrics: one PNG strip per probe and side."""
KEPT_HEIGHT = 256
"""Pixels; larger images are stored reduced to this."""
SHOWN = 8
"""Images per class and side that the page shows and the folder stores."""
ASPECT = 32
"""The most by which one side of an image may be longer than the other."""
SIDES = ("before", "after")
GIVE = "give the folder that `fdu evaluate --out` or `fdu demo` wrote"


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How the images of a run were drawn and judged; unknown fields are empty."""

    seed: int | None = None
    """Seed of the first image of every class."""
    sampling: Sampling | None = None
    judge: str = ""
    """The judge in words."""
    dtype: str = ""
    """Dtype of the pipeline's weights."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """:func:`fdu.storage.fingerprint.versions` of the machine that evaluated."""
    size: tuple[int, int] | None = None
    """Height and width of the images in pixels; None: the pipeline's own."""
    prompts: str = ""
    """Where the prompts come from, with version, in words."""


@dataclasses.dataclass(frozen=True)
class Class:
    """One probe in the metrics."""

    name: str
    role: Role
    group: Group
    prompts: tuple[str, ...]
    """The first prompts."""
    seen: dict[str, list[str]]
    """By side, the judge's answer for each shown image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """The metrics without the evaluation."""

    probes: list[Class]
    record: dict[str, Any] | None = None
    """:meth:`fdu.ErasureResult.record`, or the ``fdu.json`` next to saved weights; without it the page has no training
    curves and no settings."""
    command: str = ""
    """The command line that reproduces this."""
    device: str = ""
    notes: tuple[str, ...] = ()
    """Closing paragraphs, such as the source of the data."""
    robustness: dict[str, Any] | None = None
    """:meth:`fdu.evaluation.robustness.Robustness.as_dict`, if the erasure was examined."""
    conditions: Conditions = dataclasses.field(default_factory=Conditions)


@dataclasses.dataclass(frozen=True)
class _Named:
    """A concept in a record."""

    name: str
    prompts: list[str]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Settings that the page uses."""

    divergence: str
    max_train_steps: int
    seed: int
    learning_rate: float | None = None
    preservation_weight: float = EraseConfig.preservation_weight
    preservation_prompts: list[str] = dataclasses.field(default_factory=list)
    train_method: str = EraseConfig.train_method
    stop_at: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Record:
    """The parts of the record of an erasure that the page uses."""

    target: _Named
    anchor: _Named
    config: _Settings
    seconds: float
    history: dict[str, list[float]]
    versions: dict[str, str]
    sigma: float | None = None
    edits: list[EditFigures] = dataclasses.field(default_factory=list)
    command: str = ""
    fingerprint: str | None = None
    concepts: list[tuple[str, str]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluatedRun(Told):
    """An evaluated erasure with everything that its report shows."""

    evaluation: Evaluation
    images: dict[str, list[Tensor]]
    """By side, the first images of every probe, [<= SHOWN, 3, H, W] in [0, 1]."""

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        probes: Sequence[Probe],
        before: Draws,
        after: Draws,
        record: dict[str, Any] | None = None,
        command: str = "",
        device: str = "",
        notes: Sequence[str] = (),
        robustness: dict[str, Any] | None = None,
        conditions: Conditions | None = None,
    ) -> EvaluatedRun:
        """The run of an evaluation; the judges judge the shown images again.

        Args:
            evaluation: the figures of ``before`` and ``after``.
            probes: the probes, in the order of the draws.
            before, after: the images of every probe, [N, 3, H, W] in [0, 1].
            record, command, device, notes, robustness, conditions: see the fields; missing versions in ``conditions``
                are those of this machine.

        Raises:
            ValueError: the draws do not belong to the probes.
        """
        sides = dict(zip(SIDES, (before.images, after.images), strict=True))
        if any(len(images) != len(probes) for images in sides.values()):
            counts = f"{len(before.images)} and {len(after.images)}"
            raise ValueError(f"before and after must hold the images of {len(probes)} probes, got {counts}")
        known = conditions or Conditions()
        classes = []
        for place, one in enumerate(probes):
            seen = {side: one.judge(images[place][:SHOWN]) for side, images in sides.items()}
            classes.append(Class(one.name, one.role, one.group, one.prompts[:SHOWN], seen))
        return cls(
            evaluation=evaluation,
            probes=classes,
            images={side: [_reduced(one[:SHOWN]) for one in images] for side, images in sides.items()},
            record=record,
            command=command,
            device=device,
            notes=tuple(notes),
            robustness=robustness,
            conditions=dataclasses.replace(known, versions=known.versions or versions()),
        )

    @property
    def asked(self) -> list[Probe]:
        """The probes, without the judges, whose answers are in ``seen``."""
        return [Probe(one.name, one.prompts, one.role, _cannot_judge, one.group) for one in self.probes]

    @property
    def targets(self) -> list[str]:
        """The erased classes."""
        return [probe.name for probe in self.probes if probe.role == "target"]

    @property
    def target(self) -> str:
        """The erased classes in words: "fox", "the 50 concepts"."""
        return counted_names(self.targets, "concepts")

    @property
    def erased(self) -> list[tuple[str, str]]:
        """Targets and anchors from the record of the weights; empty without a record."""
        return erased_pairs(self.record) if self.record else []

    @property
    def anchor(self) -> str | None:
        """The targets' anchors in words; None if the record is missing or does not name every target."""
        anchors = {target.strip().casefold(): anchor for target, anchor in self.erased}
        found = [anchors.get(name.strip().casefold()) for name in self.targets]
        known = list(dict.fromkeys(anchor for anchor in found if anchor is not None))
        return None if None in found else counted_names(known, "anchors")

    def metrics(self) -> dict[str, Any]:
        """Everything but the images, for JSON."""
        metrics = {"target": ", ".join(self.targets), "targets": self.targets, **self.evaluation.as_dict()}
        if self.record is not None:
            config = dict(self.record["config"])
            trained = trains(config.get("train_method", EraseConfig.train_method))
            metrics |= {
                "anchor": self.anchor,
                "divergence": config["divergence"] if trained else None,
                "steps": len(self.record["history"].get("loss", ())) if trained else 0,
                "seed": config["seed"],
                "sigma": self.record.get("sigma"),
                "seconds": self.record["seconds"],
                "settings": config,
            }
        # The versions once more, where those who read no conditions look for them.
        metrics["versions"] = self.conditions.versions
        told = {field.name: getattr(self, field.name) for field in dataclasses.fields(Told)}
        probes, conditions = map(dataclasses.asdict, self.probes), dataclasses.asdict(self.conditions)
        return {**metrics, **told, "probes": list(probes), "conditions": conditions}

    def write(self, folder: Path) -> None:
        """Write metrics and images into a folder."""
        write_json(folder / METRICS_FILE, self.metrics())
        (folder / IMAGES_FOLDER).mkdir()
        for side in SIDES:
            for place, images in enumerate(self.images[side]):
                strip(images, gap=0, height=images.shape[2]).convert("RGB").save(
                    folder / IMAGES_FOLDER / self._file(side, place), "PNG", optimize=True
                )

    @classmethod
    def read(cls, folder: str | Path) -> EvaluatedRun:
        """Read what :meth:`write` wrote.

        Raises:
            FileNotFoundError: the folder holds no evaluation, or images are missing.
            ValueError: metrics or images are unreadable, inconsistent, or from another version of fdu.
        """
        folder = Path(folder)
        metrics = read_metrics(folder)
        try:
            evaluation: Evaluation = restored(Evaluation, metrics, "metrics")
            told: Told = restored(Told, metrics, "metrics")
            if told.record is not None:
                check_record(told.record, "metrics.record")
            if told.robustness is not None:
                robustness = restored(Robustness, told.robustness, "metrics.robustness").as_dict()
                told = dataclasses.replace(told, robustness=robustness)
            run = cls(evaluation=evaluation, images={side: [] for side in SIDES}, **vars(told))
            check_probes(run.asked)
            check_counts(evaluation, run.probes)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(folder / METRICS_FILE)!r} does not match this version of fdu ({printable(str(error))}); "
                "run `fdu evaluate` again"
            ) from error
        for side, images in run.images.items():
            for place, one in enumerate(run.probes):
                images.append(_cut(folder, run._file(side, place), len(one.seen[side])))
        return run

    def _file(self, side: str, place: int) -> str:
        probe = self.probes[place]
        name = re.sub(r"[^\w-]+", "_", probe.name).strip("_") or "class"
        return f"{place:02d}-{probe.role}-{name}-{side}.png"


def check_record(record: Any, where: str) -> None:
    """Refuse a record of an erasure that the page could not show.

    Args:
        record: the content of ``fdu.json``.
        where: its place, for error messages.

    Raises:
        ValueError: an entry is missing or wrong; names the place.
    """
    found = restored(_Record, record, where)
    unknown = found.sigma is None and trains(found.config.train_method)
    if unknown or math.isnan(found.seconds):
        raise ValueError(f"{where}: sigma and seconds must be numbers")


def check_counts(evaluation: Evaluation, probes: Sequence[Class]) -> None:
    """Refuse figures that do not match the probes, and shares outside [0, 1]."""
    shown = min(SHOWN, evaluation.images_per_class)
    for one in probes:
        counts = [len(one.seen.get(side, ())) for side in SIDES]
        if shown < 1 or counts != [shown] * len(SIDES):
            raise ValueError(f"the judge's answers for {one.name!r} must be {shown} before and after, got {counts}")
    sides = (evaluation.before, evaluation.after)
    for side in sides:
        names = ("target", "unseen", "retained", "cross_domain", "attribute")
        shares = {f"{name}_accuracy": getattr(side, f"{name}_accuracy") for name in names}
        for name in ("per_class", "retained_by_group", "attributes"):
            shares |= {f"{name}.{key}": share for key, share in getattr(side, name).items()}
        for target, became in side.became.items():
            shares |= {f"became.{target}.{key}": share for key, share in became.items()}
        for name, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {share!r}")
        lacking = {one.name for one in probes if one.role != "unseen"} | {side.worst_retained_class}
        if not side.per_class.keys() >= lacking:
            raise ValueError(f"per_class lacks {sorted(lacking - side.per_class.keys())[0]!r}")
        silent = {one.name for one in probes if one.role == "target"} - side.became.keys()
        if silent:
            raise ValueError(f"became lacks {sorted(silent)[0]!r}")
    roles = {one.role for one in probes}
    for role, figure in (("unseen", "unseen_accuracy"), ("cross_domain", "cross_domain_accuracy")):
        if any((getattr(side, figure) is not None) != (role in roles) for side in sides):
            raise ValueError(f"{figure} does not match the probes")
    if sides[0].retained_by_group.keys() != sides[1].retained_by_group.keys():
        raise ValueError("retained_by_group has different groups before and after")
    if sides[0].attributes.keys() != sides[1].attributes.keys():
        raise ValueError("attributes has different names before and after")
    if any((side.attribute_accuracy is not None) != bool(side.attributes) for side in sides):
        raise ValueError("attribute_accuracy does not match attributes")


def check_run(folder: str | Path) -> None:
    """Refuse a folder from which no report can be made.

    Raises:
        FileNotFoundError, ValueError: as :meth:`EvaluatedRun.read`.
        PermissionError: the folder cannot be written.
    """
    metrics = read_metrics(Path(folder))
    if "probes" not in metrics:
        raise ValueError(
            f"RUN {str(folder)!r} is from an earlier version of fdu, which stored no images; run `fdu evaluate` again"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"RUN {str(folder)!r} is not writable; copy it to a folder of your own")


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics.json of a run's folder.

    Raises:
        FileNotFoundError: the folder, or the file in it, does not exist.
        ValueError: it is not JSON, or not an evaluation.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"RUN {str(folder)!r} is not a folder; {GIVE}")
        if (folder / RECORD_FILE).is_file():
            raise FileNotFoundError(
                f"RUN {str(folder)!r} holds an erasure without an evaluation; run `fdu evaluate BASE {folder} --out "
                "DIR`, then `fdu report DIR`"
            )
        raise FileNotFoundError(f"RUN {str(folder)!r} has no {METRICS_FILE}; {GIVE}")
    metrics = read_json(path, "run `fdu evaluate` again")
    if not isinstance(metrics, dict) or not metrics.keys() >= METRICS_KEYS:
        raise ValueError(f"{str(path)!r} is not an evaluation by fdu; {GIVE}")
    return metrics


def _reduced(images: Tensor) -> Tensor:
    """Images as they are stored: reduced, and rounded to 8 bits."""
    height, width = images.shape[-2:]
    if height > KEPT_HEIGHT:
        size = (KEPT_HEIGHT, round(width * KEPT_HEIGHT / height))
        images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(0, 1).mul(255).round() / 255


def _cannot_judge(images: Tensor) -> list[str]:
    raise RuntimeError(
        "probes loaded from a report cannot judge images; the judge's recorded answers are in EvaluatedRun.probes"
    )


def _cut(folder: Path, name: str, count: int) -> Tensor:
    """The images [count, 3, H, W] in [0, 1] of a strip in a run's folder."""
    path = folder / IMAGES_FOLDER / name
    try:
        present = path.is_file()
    except OSError:  # the name is too long
        present = False
    if not present:
        raise FileNotFoundError(f"{str(path)!r}, which the report shows, is missing; run `fdu evaluate` again")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{str(path)!r} is a link out of the folder; put a copy of the image in its place")
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            width, height = picture.width / count, picture.height
            if picture.width % count or height > KEPT_HEIGHT or not height <= ASPECT * width <= ASPECT**2 * height:
                raise ValueError(f"{picture.width} x {picture.height} pixels for {count} images")
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{str(path)!r} is not the strip of images that fdu wrote ({printable(str(error))}); "
            "run `fdu evaluate` again"
        ) from error
    return torch.stack(pixels.chunk(count, dim=2))
