"""The result of an erasure: the changed pipeline, its record, and how to save it."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from fdu.concepts import Concept, Pair, joined, weights_of
from fdu.config import PLACES, EraseConfig
from fdu.evaluation import Draws, Evaluation, Probe
from fdu.models.denoiser import Denoiser
from fdu.models.parts import active_adapters
from fdu.models.quantization import quantization_of
from fdu.report import EvaluatedRun, write_report
from fdu.report.card import fill_in, write_card
from fdu.report.hub import Upload
from fdu.storage.fingerprint import fingerprint, versions
from fdu.storage.formats import choose_format, public_name, write
from fdu.storage.loading import REVISION_MARK
from fdu.storage.output import RECORD_FILE, whole_folder, write_json
from fdu.storage.single_file import CONFIG_MARK
from fdu.training.closed_form import EditFigures
from fdu.training.methods import Trainable


@dataclasses.dataclass(frozen=True)
class ErasureResult:
    """A finished erasure."""

    denoiser: Denoiser
    """The denoiser, with the concept erased."""
    pairs: tuple[Pair, ...]
    """Targets and their anchors."""
    config: EraseConfig
    """All settings."""
    trainable: Trainable
    """The trained weights."""
    history: dict[str, list[float]]
    """One value per step: "loss", its parts "divergence" and "preservation", "distance" (the median squared error) and,
    with a critic, "critic" (its lower bound on the divergence)."""
    sigma: float | None
    """Standard deviation sigma in s = |pred - target|^2 / sigma^2, in units of the denoiser's output; None without
    training."""
    seconds: float
    """Duration of the erasure; for a resumed run, of its last part."""
    edits: tuple[EditFigures, ...] = ()
    """What was computed in closed form: all of the erasure, or its start."""

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline, with the concept erased."""
        return self.denoiser.pipeline

    @property
    def target(self) -> Concept:
        """The erased concept; several are merged into one."""
        return joined([target for target, _ in self.pairs])

    @property
    def anchor(self) -> Concept:
        """The concept that replaced it; several are merged into one."""
        return joined([anchor for _, anchor in self.pairs])

    @contextmanager
    def original(self) -> Iterator[DiffusionPipeline]:
        """Context in which the pipeline draws as before the erasure."""
        with self.trainable.frozen():
            yield self.pipeline

    def fingerprint(self) -> str | None:
        """Fingerprint of the weights before the erasure; None if the erasure can no longer be switched off."""
        try:
            with self.original() as pipeline:
                return fingerprint(pipeline)
        except RuntimeError:
            return None

    def base_adapters(self) -> list[str] | None:
        """Names of the adapters that were active before the erasure, as part of the base; None as for
        :meth:`fingerprint`, which leaves them out."""
        try:
            with self.original() as pipeline:
                return active_adapters(pipeline)
        except RuntimeError:
            return None

    def record(self, command: str = "") -> dict[str, Any]:
        """Everything but the weights, for JSON, with the command line if there was one."""
        return {
            "base": public_name(str(self.pipeline.config.get("_name_or_path", ""))),
            "fingerprint": self.fingerprint(),
            "adapters": self.base_adapters(),
            "command": command,
            "target": {"name": self.target.name, "prompts": self.target.prompts},
            "anchor": {"name": self.anchor.name, "prompts": self.anchor.prompts},
            "concepts": [[target.name, anchor.name] for target, anchor in self.pairs],
            "weights": weights_of(self.pairs),
            "revision": vars(self.pipeline).get(REVISION_MARK),
            "model_config": public_name(vars(self.pipeline).get(CONFIG_MARK) or "") or None,
            "quantization": quantization_of(self.pipeline),
            "config": {name: value for name, value in self.config.as_dict().items() if name not in PLACES},
            "sigma": self.sigma,
            "edits": [dataclasses.asdict(edit) for edit in self.edits],
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
        """Write the weights, ``fdu.json`` (the record) and README.md (a model card), whole or not at all.

        Args:
            folder: the folder to write.
            overwrite: replace an earlier result there.
            save_as: "lora" (diffusers), "kohya" (ComfyUI, A1111, Forge), "pipeline" (a full pipeline) or "delta" (the
                changed weights). "auto": "lora" if adapters were trained, otherwise "pipeline". The card and
                :func:`fdu.storage.formats.write` tell how to load each.
            evaluation, probes: figures for the card.
            command: the command line that made the result, for the record.

        Raises:
            FileExistsError: the folder is not empty, and ``overwrite`` is false or fdu did not write it.
            ValueError: the folder is a mount point or contains the working or home folder, or ``save_as`` does not fit
                the result.
            OSError: the folder cannot be written.
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

    def push_to_hub(
        self,
        repo_id: str,
        evaluation: Evaluation | None = None,
        probes: Sequence[Probe] = (),
        before: Draws | None = None,
        after: Draws | None = None,
        *,
        unevaluated: bool = False,
        save_as: str = "auto",
        commit_message: str = "Upload an erasure by fdu",
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Push the weights, the record and the model card to the Hugging Face hub; returns the repository's address.

        Args:
            repo_id: org/name, or a name in your own namespace. The repository is made if there is none.
            evaluation, probes: figures for the card.
            before, after: the images of the evaluation, if the card is to show some.
            unevaluated: push although the card has no figures.
            save_as: see :meth:`save`.
            commit_message: of the commit.
            private: whether a new repository is private; None: as its owner's settings say.
            token: None: that of `hf auth login` or HF_TOKEN.

        Raises:
            ValueError: no evaluation; one of ``before`` and ``after`` alone; or a name or a token that cannot be used.
            OSError: the hub cannot be reached, or it refused; the erasure stays as it is.
        """
        if evaluation is None and not unevaluated:
            raise ValueError(
                "evaluation is missing: give the output of fdu.evaluate for the model card, or set unevaluated"
            )
        if (before is None) != (after is None) or (before is not None and evaluation is None):
            raise ValueError("before and after go together, and with evaluation; give all three or leave them out")
        upload = Upload.checked(repo_id, token, private)
        with tempfile.TemporaryDirectory() as place:
            folder = self.save(Path(place) / "erased", save_as=save_as, evaluation=evaluation, probes=probes)
            if before is not None and after is not None and evaluation is not None:
                fill_in(folder, EvaluatedRun.of(evaluation, probes, before, after, self.record()))
            again = "the erasure is unchanged; call push_to_hub again, or save it"
            return upload.push(folder, unevaluated, again, commit_message)

    def report(
        self, path: str | Path, evaluation: Evaluation, probes: Sequence[Probe], before: Draws, after: Draws
    ) -> Path:
        """Write the HTML report of this erasure; see :func:`fdu.report.write_report`."""
        return write_report(path, EvaluatedRun.of(evaluation, probes, before, after, self.record()))
