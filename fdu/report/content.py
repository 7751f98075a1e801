"""The files that regenerate a report: metrics.json and the images on the page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from fdu.evaluation import Draws, Evaluation, Probe
from fdu.evaluation.probes import check_probes
from fdu.report.pictures import strip
from fdu.report.reading import restored
from fdu.report.stored import SHOWN, SIDES, Conditions, Told, check_counts, check_record, read_metrics
from fdu.storage.output import METRICS_FILE, write_json
from fdu.storage.versions import versions

IMAGES_FOLDER = "images"
"""Folder with the shown images beside the metrics: one PNG strip per probe and side."""
KEPT_HEIGHT = 256
"""Pixels; larger images are stored reduced to this."""


@dataclasses.dataclass(frozen=True)
class EvaluatedRun:
    """An evaluated erasure with everything that its report shows."""

    evaluation: Evaluation
    probes: list[Probe]
    images: dict[str, list[Tensor]]
    """By side, the first images of every probe, [<= SHOWN, 3, H, W] in [0, 1]."""
    seen: dict[str, list[list[str]]]
    """By side, the judge's answer for each of them."""
    robustness: Mapping[str, Any] | None = None
    """:meth:`fdu.evaluation.robustness.Robustness.as_dict`, if the erasure was examined."""
    record: Mapping[str, Any] | None = None
    """:meth:`fdu.ErasureResult.record`, or the ``fdu.json`` beside saved weights."""
    command: str = ""
    """The command line that reproduces this."""
    device: str = ""
    notes: tuple[str, ...] = ()
    """Closing paragraphs, such as the source of the data."""
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
    ) -> EvaluatedRun:
        """The run of an evaluation; the judges judge the shown images again.

        Args:
            evaluation: the figures of ``before`` and ``after``.
            probes: the probes, in the order of the draws.
            before, after: the images of every probe, [N, 3, H, W] in [0, 1].
            record: without it the page has no training curves and no settings.
            command, device, notes, robustness: see the fields.
            conditions: see the field; missing versions are those of this machine.

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
        """The erased class."""
        return next(probe.name for probe in self.probes if probe.role == "target")

    @property
    def erased(self) -> list[tuple[str, str]]:
        """Targets and anchors from the record of the weights; empty without a record."""
        if self.record is None:
            return []
        pairs = self.record.get("concepts") or [(self.record["target"]["name"], self.record["anchor"]["name"])]
        return [(target, anchor) for target, anchor in pairs]

    @property
    def anchor(self) -> str | None:
        """The target's anchor; None if the record is missing or does not name the target."""
        named = self.target.strip().casefold()
        return next((anchor for target, anchor in self.erased if target.strip().casefold() == named), None)

    def metrics(self) -> dict[str, Any]:
        """Everything but the images, for JSON."""
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
    def read(cls, folder: str | Path) -> EvaluatedRun:
        """Read what :meth:`write` wrote.

        Raises:
            FileNotFoundError: the folder holds no evaluation, or images are missing.
            ValueError: metrics or images are unreadable, inconsistent, or from another version of fdu.
        """
        folder = Path(folder)
        metrics = read_metrics(folder)
        try:
            evaluation = restored(Evaluation, metrics, "metrics")
            told = restored(Told, metrics, "metrics")
            if told.record is not None:
                check_record(told.record, "metrics.record")
            probes = [Probe(one.name, one.prompts, one.role, _cannot_judge, one.group) for one in told.probes]
            check_probes(probes)
            check_counts(evaluation, told.probes)
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
                f"{str(folder / METRICS_FILE)!r} does not match this version of fdu ({error}); run `fdu evaluate` again"
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


def _reduced(images: Tensor) -> Tensor:
    """Images as they are stored: reduced, and rounded to 8 bits."""
    height, width = images.shape[-2:]
    if height > KEPT_HEIGHT:
        size = (KEPT_HEIGHT, round(width * KEPT_HEIGHT / height))
        images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images.clamp(0, 1).mul(255).round() / 255


def _cannot_judge(images: Tensor) -> list[str]:
    raise RuntimeError("a run read from a folder has no judge; its answers are in EvaluatedRun.seen")


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
