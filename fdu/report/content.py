"""The files that regenerate a report: metrics.json and the images on the page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fdu.evaluation import Draws, Evaluation, Probe
from fdu.evaluation.probes import check_probes
from fdu.evaluation.robustness import Robustness
from fdu.report.pictures import strip
from fdu.report.stored import SHOWN, SIDES, Class, Conditions, Told, check_counts, check_record, read_metrics, restored
from fdu.storage.fingerprint import versions
from fdu.storage.loading import erased_pairs
from fdu.storage.output import METRICS_FILE, write_json

IMAGES_FOLDER = "images"
"""Folder with the shown images beside the metrics: one PNG strip per probe and side."""
KEPT_HEIGHT = 256
"""Pixels; larger images are stored reduced to this."""


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
    def target(self) -> str:
        """The erased class."""
        return next(probe.name for probe in self.probes if probe.role == "target")

    @property
    def erased(self) -> list[tuple[str, str]]:
        """Targets and anchors from the record of the weights; empty without a record."""
        return erased_pairs(self.record) if self.record else []

    @property
    def anchor(self) -> str | None:
        """The target's anchor; None if the record is missing or does not name the target."""
        named = self.target.strip().casefold()
        return next((anchor for target, anchor in self.erased if target.strip().casefold() == named), None)

    def metrics(self) -> dict[str, Any]:
        """Everything but the images, for JSON."""
        metrics = {"target": self.target, **self.evaluation.as_dict()}
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
                f"{str(folder / METRICS_FILE)!r} does not match this version of fdu ({error}); run `fdu evaluate` again"
            ) from error
        for side, images in run.images.items():
            for place, one in enumerate(run.probes):
                images.append(_cut(folder / IMAGES_FOLDER / run._file(side, place), len(one.seen[side])))
        return run

    def _file(self, side: str, place: int) -> str:
        probe = self.probes[place]
        name = re.sub(r"[^\w-]+", "_", probe.name).strip("_") or "class"
        return f"{place:02d}-{probe.role}-{name}-{side}.png"


def _reduced(images: Tensor) -> Tensor:
    """Images as they are stored: reduced, and rounded to 8 bits."""
    height, width = images.shape[-2:]
    if height > KEPT_HEIGHT:
        size = (KEPT_HEIGHT, round(width * KEPT_HEIGHT / height))
        images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(0, 1).mul(255).round() / 255


def _cannot_judge(images: Tensor) -> list[str]:
    raise RuntimeError("a report's probes have no judges; the answers are in EvaluatedRun.probes")


def _cut(path: Path, count: int) -> Tensor:
    """The images [count, 3, H, W] in [0, 1] of a strip."""
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r}, which the report shows, is missing; run `fdu evaluate` again")
    try:
        with Image.open(path) as picture:
            if picture.width % count or picture.height > KEPT_HEIGHT:
                raise ValueError(f"{picture.width} x {picture.height} pixels for {count} images")
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{str(path)!r} is not the strip of images that fdu wrote ({error}); run `fdu evaluate` again"
        ) from error
    return torch.stack(pixels.chunk(count, dim=2))
