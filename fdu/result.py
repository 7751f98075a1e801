"""What an erasure gives back: the changed pipeline, how it came about, and how to keep it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fdu.concepts import Concept
from fdu.config import EraseConfig
from fdu.output import whole_folder
from fdu.trainable import Trainable
from fdu.versions import versions

RECORD_FILE = "fdu.json"
"""Beside the weights: what was erased, with which settings and versions, and the course of the training."""


@dataclasses.dataclass(frozen=True)
class ErasureResult:
    """A finished erasure."""

    pipeline: DiffusionPipeline
    """The pipeline, with the concept erased."""
    target: Concept
    """What was erased."""
    anchor: Concept
    """What took its place."""
    config: EraseConfig
    """All settings."""
    trainable: Trainable
    """The trained part."""
    history: dict[str, list[float]]
    """A value a step: "loss", its parts "divergence" and "preservation", and "distance", the median squared error."""
    sigma: float
    """The scale of the denoiser's error that was used, in units of its output."""
    seconds: float
    """How long the erasure took."""

    @contextmanager
    def original(self) -> Iterator[DiffusionPipeline]:
        """Within this context the pipeline draws as before the erasure."""
        with self.trainable.frozen():
            yield self.pipeline

    def record(self) -> dict[str, Any]:
        """Everything but the weights, ready for JSON."""
        return {
            "base": str(self.pipeline.config.get("_name_or_path", "")),
            "target": dataclasses.asdict(self.target),
            "anchor": dataclasses.asdict(self.anchor),
            "config": dataclasses.asdict(self.config),
            "sigma": self.sigma,
            "seconds": self.seconds,
            "history": self.history,
            "versions": versions(),
        }

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the result, whole or not at all; plain diffusers loads it.

        LoRA weights load with ``pipeline.load_lora_weights(folder)``; a full pipeline (train_method "cross_attention")
        with ``DiffusionPipeline.from_pretrained(folder)``. ``fdu.json`` beside them records how it was made.

        Raises:
            FileExistsError: the folder is not empty and ``overwrite`` is false.
            OSError: it cannot be written.
        """
        with whole_folder(folder, overwrite) as fresh:
            self.trainable.save(self.pipeline, fresh)
            (fresh / RECORD_FILE).write_text(json.dumps(self.record(), indent=1) + "\n")
        return Path(folder)
