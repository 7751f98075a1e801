"""What a run leaves so that its report can be made anew: metrics.json, and the images that the page shows."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fdu.evaluation import Draws, Evaluation, Group, Probe, Role, Sampling
from fdu.evaluation.probes import check_probes
from fdu.loading import RECORD_KEYS
from fdu.output import METRICS_FILE, METRICS_KEYS, RECORD_FILE, write_json
from fdu.pictures import strip
from fdu.report.reading import restored
from fdu.robustness import Robustness
from fdu.versions import versions

IMAGES_FOLDER = "images"
"""Strips of the shown images as PNG, one a probe and side, beside the metrics."""
SHOWN = 8
"""Images a class that the page shows on either side, and the folder keeps."""
KEPT_HEIGHT = 256
"""Pixels; larger images are kept reduced to this."""
SIDES = ("before", "after")
GIVE = "give the folder that `fdu evaluate --out` or `fdu demo` wrote"


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How the images of a run were drawn and judged; what is not known is empty."""

    seed: int | None = None
    """Of the first image of every class."""
    sampling: Sampling | None = None
    judge: str = ""
    """Who told what the images show, in words."""
    dtype: str = ""
    """Of the pipeline's weights."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """:func:`fdu.versions.versions` where it was evaluated."""


@dataclasses.dataclass(frozen=True)
class Run:
    """An evaluated erasure, as its report tells it."""

    evaluation: Evaluation
    probes: list[Probe]
    images: dict[str, list[Tensor]]
    """By side, the first images of every probe, [<= SHOWN, 3, H, W] in [0, 1]."""
    seen: dict[str, list[list[str]]]
    """By side, what the judge saw in each of them."""
    robustness: Mapping[str, Any] | None = None
    """:meth:`fdu.robustness.Robustness.as_dict`, if the erasure was examined."""
    record: Mapping[str, Any] | None = None
    """:meth:`fdu.ErasureResult.record`, or the ``fdu.json`` beside saved weights."""
    command: str = ""
    """The command line that makes this again."""
    device: str = ""
    notes: tuple[str, ...] = ()
    """Paragraphs to end with, such as the source of the data."""
    conditions: Conditions = dataclasses.field(default_factory=Conditions)

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        probes: Sequence[Probe],
        before: Draws,
        after: Draws,
        record: Mapping[str, Any] | None = None,
        command: str = "",
        device: str = "",
        notes: Sequence[str] = (),
        robustness: Mapping[str, Any] | None = None,
        conditions: Conditions | None = None,
    ) -> Run:
        """The run of an evaluation; the judges look at the shown images once more.

        Args:
            evaluation: the figures of ``before`` and ``after``.
            probes: what was drawn, in the order of the draws.
            before, after: the images of every probe, [N, 3, H, W] in [0, 1].
            record: without it the page has no course of the training and no settings.
            command, device, notes, robustness: as the fields.
            conditions: as the field; versions, if they hold none, are those of this machine.

        Raises:
            ValueError: the draws do not belong to the probes.
        """
        if not len(probes) == len(before.images) == len(after.images):
            counts = f"{len(before.images)} and {len(after.images)}"
            raise ValueError(f"before and after must hold the images of {len(probes)} probes, got {counts}")
        images: dict[str, list[Tensor]] = {}
        seen: dict[str, list[list[str]]] = {}
        for side, draws in zip(SIDES, (before, after), strict=True):
            shown = [drawn[:SHOWN] for drawn in draws.images]
            seen[side] = [probe.judge(one) for probe, one in zip(probes, shown, strict=True)]
            images[side] = [_reduced(one) for one in shown]
        known = conditions or Conditions()
        known = dataclasses.replace(known, versions=known.versions or versions())
        return cls(evaluation, list(probes), images, seen, robustness, record, command, device, tuple(notes), known)

    @property
    def target(self) -> str:
        """The class that was to be erased."""
        return next(probe.name for probe in self.probes if probe.role == "target")

    @property
    def erased(self) -> list[tuple[str, str]]:
        """What the weights erased according to their record, each with its anchor; empty without a record."""
        if self.record is None:
            return []
        pairs = self.record.get("concepts") or [(self.record["target"]["name"], self.record["anchor"]["name"])]
        return [(target, anchor) for target, anchor in pairs]

    @property
    def anchor(self) -> str | None:
        """What took the target's place; None if the weights did not erase it, or nothing is recorded."""
        named = self.target.strip().casefold()
        return next((anchor for target, anchor in self.erased if target.strip().casefold() == named), None)

    def metrics(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON."""
        metrics = {"target": self.target, **self.evaluation.as_dict()}
        if self.robustness is not None:
            metrics["robustness"] = self.robustness
        if self.record is not None:
            config = dict(self.record["config"])
            metrics |= {
                "anchor": self.anchor,
                "divergence": config["divergence"],
                "steps": config["max_train_steps"],
                "seed": config["seed"],
                "sigma": self.record["sigma"],
                "seconds": self.record["seconds"],
                "settings": config,
            }
        probes = [
            {
                **{name: getattr(probe, name) for name in ("name", "role", "group")},
                "prompts": list(probe.prompts[:SHOWN]),
                "seen": {side: self.seen[side][place] for side in SIDES},
            }
            for place, probe in enumerate(self.probes)
        ]
        told: dict[str, Any] = {"device": self.device, "command": self.command, "notes": list(self.notes)}
        # The versions once more, where those who read no conditions look for them.
        told |= {"conditions": dataclasses.asdict(self.conditions), "versions": self.conditions.versions}
        return metrics | {**told, "probes": probes, "record": self.record}

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
    def read(cls, folder: str | Path) -> Run:
        """What :meth:`write` wrote.

        Raises:
            FileNotFoundError: no evaluation lies there, or images are missing.
            ValueError: metrics or images cannot be read, do not fit together, or are of another version of fdu.
        """
        folder = Path(folder)
        metrics = _metrics(folder)
        try:
            evaluation = restored(Evaluation, metrics, "metrics")
            told = restored(_Told, metrics, "metrics")
            if told.record is not None:
                check_record(told.record, "metrics.record")
            probes = [Probe(one.name, one.prompts, one.role, _cannot_judge, one.group) for one in told.probes]
            check_probes(probes)
            _check_counts(evaluation, told.probes)
            run = cls(
                evaluation=evaluation,
                probes=probes,
                images={side: [] for side in SIDES},
                seen={side: [one.seen[side] for one in told.probes] for side in SIDES},
                robustness=told.robustness.as_dict() if told.robustness else None,
                record=told.record,
                command=told.command,
                device=told.device,
                notes=told.notes,
                conditions=told.conditions,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(folder / METRICS_FILE)!r} is not what this version of fdu writes ({error}); evaluate anew"
            ) from error
        for side in SIDES:
            for place, seen in enumerate(run.seen[side]):
                run.images[side].append(_cut(folder / IMAGES_FOLDER / run._file(side, place), len(seen)))
        return run

    def draws(self, side: str) -> Draws:
        """The shown images of one side."""
        return Draws(self.images[side])

    def _file(self, side: str, place: int) -> str:
        probe = self.probes[place]
        name = re.sub(r"[^\w-]+", "_", probe.name).strip("_") or "class"
        return f"{place:02d}-{probe.role}-{name}-{side}.png"


def check_run(folder: str | Path) -> None:
    """Refuse a folder of which no report can be made.

    Raises:
        FileNotFoundError, ValueError: as :meth:`Run.read`.
        PermissionError: nothing can be written there.
    """
    metrics = _metrics(Path(folder))
    if "probes" not in metrics:
        raise ValueError(
            f"RUN {str(folder)!r} was written by an earlier version of fdu, which kept no images; evaluate anew"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"RUN {str(folder)!r} cannot be written; copy it to a place of your own")


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / METRICS_FILE
    if not path.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"RUN {str(folder)!r} is no folder; {GIVE}")
        if (folder / RECORD_FILE).is_file():
            raise FileNotFoundError(
                f"RUN {str(folder)!r} holds an erasure that nobody has judged; first `fdu evaluate BASE {folder} --out "
                "DIR`, then `fdu report DIR`"
            )
        raise FileNotFoundError(f"RUN {str(folder)!r} holds no {METRICS_FILE}; {GIVE}")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}); evaluate anew") from error
    if not isinstance(metrics, dict) or not metrics.keys() >= METRICS_KEYS:
        raise ValueError(f"{str(path)!r} is not an evaluation of fdu; {GIVE}")
    return metrics


@dataclasses.dataclass(frozen=True)
class _Class:
    """One probe, as the metrics tell it."""

    name: str
    role: Role
    group: Group
    prompts: tuple[str, ...]
    seen: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class _Told:
    """What the metrics hold beside the evaluation."""

    probes: list[_Class]
    record: dict[str, Any] | None
    command: str
    device: str
    notes: tuple[str, ...]
    robustness: Robustness | None = None
    conditions: Conditions = dataclasses.field(default_factory=Conditions)


@dataclasses.dataclass(frozen=True)
class _Course:
    """What the page takes of a record beside RECORD_KEYS."""

    history: dict[str, list[float]]
    versions: dict[str, str]
    command: str = ""
    fingerprint: str | None = None
    concepts: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Refuse a record of an erasure that the page could not tell.

    Args:
        record: :meth:`fdu.ErasureResult.record`, or what was read of ``fdu.json``.
        where: what holds it, for messages.

    Raises:
        ValueError: something is missing or wrong; names the place.
    """
    for key, types in RECORD_KEYS.items():
        entry: Any = record
        for name in key.split("."):
            entry = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(entry, types):
            raise ValueError(f"{where}.{key} is missing or wrong")
    restored(_Course, record, where)


def _check_counts(evaluation: Evaluation, probes: Sequence[_Class]) -> None:
    """Refuse figures and probes that do not belong together, and shares that are none."""
    shown = min(SHOWN, evaluation.images_per_class)
    for one in probes:
        counts = [len(one.seen.get(side, ())) for side in SIDES]
        if shown < 1 or counts != [shown] * len(SIDES):
            raise ValueError(f"the judge's words for {one.name!r} must be {shown} before and after, got {counts}")
    sides = (evaluation.before, evaluation.after)
    for side in sides:
        several = [
            share for one in (side.per_class, side.target_became, side.retained_by_group) for share in one.values()
        ]
        single = (side.target_accuracy, side.unseen_accuracy, side.retained_accuracy, side.cross_domain_accuracy)
        shares = [*several, *(share for share in single if share is not None)]
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError("a share is not in [0, 1]")
        lacking = {one.name for one in probes if one.role != "unseen"} | {side.worst_retained_class}
        if not side.per_class.keys() >= lacking:
            raise ValueError(f"per_class lacks {sorted(lacking - side.per_class.keys())[0]!r}")
    roles = {one.role for one in probes}
    for role, figure in (("unseen", "unseen_accuracy"), ("cross_domain", "cross_domain_accuracy")):
        if any((getattr(side, figure) is not None) != (role in roles) for side in sides):
            raise ValueError(f"{figure} does not fit the probes")
    if sides[0].retained_by_group.keys() != sides[1].retained_by_group.keys():
        raise ValueError("retained_by_group does not hold the same before and after")


def _reduced(images: Tensor) -> Tensor:
    """Images as they are kept: not too large, and of the values that a PNG has."""
    height, width = images.shape[-2:]
    if height > KEPT_HEIGHT:
        size = (KEPT_HEIGHT, round(width * KEPT_HEIGHT / height))
        images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(0, 1).mul(255).round() / 255


def _cannot_judge(images: Tensor) -> list[str]:
    raise RuntimeError("the judge of a run that was read is not there; what it saw is in Run.seen")


def _cut(path: Path, count: int) -> Tensor:
    """The images [count, 3, H, W] in [0, 1] of a strip."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is missing, which the report shows; evaluate anew")
    try:
        with Image.open(path) as picture:
            if picture.width % count or picture.height > KEPT_HEIGHT:
                raise ValueError(f"{picture.width} x {picture.height} pixels for {count} images")
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} is not the strip of images that fdu wrote ({error}); evaluate anew") from error
    return torch.stack(pixels.chunk(count, dim=2))
