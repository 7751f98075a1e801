"""What an erasure gives back: the changed pipeline, how it came about, and how to keep it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fdu.concepts import Concept, Pair, joined
from fdu.config import PLACES, EraseConfig
from fdu.evaluation import Draws, Evaluation, Probe
from fdu.models.denoiser import Denoiser
from fdu.report import EvaluatedRun, write_report
from fdu.report.card import write_card
from fdu.storage.fingerprint import fingerprint
from fdu.storage.output import RECORD_FILE, whole_folder, write_json
from fdu.storage.versions import versions
from fdu.storage.writers import choose_format, public_name, write
from fdu.training.methods import Trainable


@dataclasses.dataclass(frozen=True)
class ErasureResult:
    """A finished erasure."""

    denoiser: Denoiser
    """The denoiser of the pipeline, with the concept erased."""
    pairs: tuple[Pair, ...]
    """What was erased, and what took its place; one or several."""
    config: EraseConfig
    """All settings."""
    trainable: Trainable
    """The trained part."""
    history: dict[str, list[float]]
    """A value a step: "loss", its parts "divergence" and "preservation", "distance", the median squared error, and with
    a critic "critic", its bound of the divergence."""
    sigma: float
    """The scale of the denoiser's error that was used, in units of its output."""
    seconds: float
    """How long the erasure took; of a run that was resumed, its last part."""

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline, with the concept erased."""
        return self.denoiser.pipeline

    @property
    def target(self) -> Concept:
        """What was erased; several concepts as one."""
        return joined([target for target, _ in self.pairs])

    @property
    def anchor(self) -> Concept:
        """What took its place."""
        return joined([anchor for _, anchor in self.pairs])

    @contextmanager
    def original(self) -> Iterator[DiffusionPipeline]:
        """Within this context the pipeline draws as before the erasure."""
        with self.trainable.frozen():
            yield self.pipeline

    def fingerprint(self) -> str | None:
        """That of the weights before the erasure; None if the erasure cannot be switched off any more."""
        try:
            with self.original() as pipeline:
                return fingerprint(pipeline)
        except RuntimeError:
            return None

    def record(self, command: str = "") -> dict[str, Any]:
        """Everything but the weights, ready for JSON; with the command line that made it, if there was one."""
        return {
            "base": public_name(str(self.pipeline.config.get("_name_or_path", ""))),
            "fingerprint": self.fingerprint(),
            "command": command,
            "target": dataclasses.asdict(self.target),
            "anchor": dataclasses.asdict(self.anchor),
            "concepts": [[target.name, anchor.name] for target, anchor in self.pairs],
            "config": {name: value for name, value in self.config.as_dict().items() if name not in PLACES},
            "sigma": self.sigma,
            "seconds": self.seconds,
            "history": self.history,
            "versions": versions(),
        }

    def save(
        self,
        folder: str | Path,
        overwrite: bool = False,
        save_as: str = "auto",
        evaluation: Evaluation | None = None,
        probes: Sequence[Probe] = (),
        command: str = "",
    ) -> Path:
        """Write the result, whole or not at all.

        Beside the weights lie ``fdu.json``, which records how they were made, and a model card, README.md.

        Args:
            folder: where to.
            overwrite: whether a former result there is replaced.
            save_as: "lora" (diffusers), "kohya" (ComfyUI, A1111, Forge), "pipeline" (a whole folder) or "delta" (the
                changed weights); "auto" is "lora" where adapters were trained, else "pipeline". How each loads is said
                in :func:`fdu.storage.writers.write` and in the card.
            evaluation, probes: figures for the card.
            command: the command line that made the result, for the record.

        Raises:
            FileExistsError: the folder is not empty and either ``overwrite`` is false or fdu did not write it.
            ValueError: it is a mount point, or holds the working or the home folder; or a form that this result cannot
                have.
            OSError: it cannot be written.
        """
        format = choose_format(save_as, self.config.train_method, self.pipeline)
        record = self.record(command)
        with whole_folder(folder, overwrite) as fresh:
            write(
                fresh,
                format,
                self.pipeline,
                self.trainable.lora_layers(),
                self.trainable.changed_weights(),
                self.config.lora_alpha,
                record["base"],
                {"target": self.target.name, "anchor": self.anchor.name},
            )
            write_json(fresh / RECORD_FILE, record)
            write_card(fresh, format, self.pipeline, record, evaluation, probes)
        return Path(folder)

    def report(
        self, path: str | Path, evaluation: Evaluation, probes: Sequence[Probe], before: Draws, after: Draws
    ) -> Path:
        """Write the HTML page of this erasure: :func:`fdu.report.write_report` with its record."""
        return write_report(path, EvaluatedRun.of(evaluation, probes, before, after, self.record()))
