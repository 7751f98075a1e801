"""A subject: a model that concepts are erased from, with its words, its probes and its judges."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fdu.concepts import ConceptType, Pair, concept_pairs, read_concepts
from fdu.models.loading import load_model

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fdu.config import EraseConfig
    from fdu.evaluation import Probe, Sampling
    from fdu.evaluation.features import Features


@dataclasses.dataclass(frozen=True)
class Panel:
    """The judges of one erasure, loaded."""

    probes: list[Probe]
    """The images to draw, and who judges them; the target's probe comes first."""
    features: Features
    """Features for the distances between images."""
    judge: str
    """The judge in words, for reports."""


@dataclasses.dataclass(frozen=True)
class Exam(ABC):
    """The questions that judge the erasure of one target, checked; nothing is loaded yet."""

    target: str
    kind: str
    """The folder of prompt sets for robustness that suits the target: digit, ink, object or style."""
    digest: str | None
    """Changes with the prompts, where these do not follow from the names alone."""

    @abstractmethod
    def panel(self, device: str = "cpu") -> Panel:
        """Load the judges.

        Raises:
            OSError: an encoder cannot be loaded.
        """


class Subject(ABC):
    """A model to erase from. Making one checks its name and loads nothing."""

    title: ClassVar[str] = ""
    """Its name in prose, where it has one."""
    light: ClassVar[bool] = False
    """Whether it is small enough for one process per CPU core."""
    judges_itself: ClassVar[bool] = False
    """Whether it has a judge of its own, so that an encoder measures distances only."""

    def __init__(self, model: str) -> None:
        self.model = model

    @property
    @abstractmethod
    def location(self) -> str:
        """The argument for ``from_pretrained``: a folder or a hub id."""

    @property
    @abstractmethod
    def sampling(self) -> Sampling:
        """How judged images are drawn by default."""

    @property
    @abstractmethod
    def notes(self) -> tuple[str, ...]:
        """Paragraphs that a reader of its results needs."""

    @property
    @abstractmethod
    def loading_code(self) -> str:
        """The Python expression that loads it."""

    @property
    def folder(self) -> Path | None:
        """The pipeline's folder; None for a hub id."""
        return Path(self.location) if Path(self.location).is_dir() else None

    def load(self, dtype: str = "float32", device: str = "cpu") -> DiffusionPipeline:
        """Load the pipeline.

        Raises:
            OSError: it cannot be loaded; the message gives the first line of the reason.
        """
        return load_model(self.location, dtype, device)

    def pairs(
        self,
        targets: Sequence[str],
        anchors: Sequence[str],
        concept_type: ConceptType | Sequence[ConceptType] = "object",
    ) -> tuple[Pair, ...]:
        """Targets and their anchors in the words of the model: names, or ``.txt`` files of prompts.

        Raises:
            ValueError, FileNotFoundError: as ``concept_pairs``, or a name that the model does not know.
        """
        return concept_pairs(read_concepts(targets), read_concepts(anchors), concept_type)

    def with_preserved(self, config: EraseConfig, targets: Sequence[str]) -> EraseConfig:
        """The settings with the model's own prompts to preserve, if it has any and the settings name none."""
        return config

    @abstractmethod
    def exam(
        self,
        target: str | None,
        erased: Sequence[str] = (),
        prompts: str | Path | None = None,
        record: Mapping[str, Any] | None = None,
        judge: str | None = None,
    ) -> Exam:
        """The questions that judge an erasure.

        Args:
            target: the erased concept; None: the one that ``prompts`` names.
            erased: all erased concepts; the others are neither retained nor lost.
            prompts: a concept set by name or file, as :func:`fdu.subjects.concept_sets.choose_set` takes it.
            record: the record of the erasure, if there is one.
            judge: an image-text encoder, by folder or hub id.

        Raises:
            ValueError, FileNotFoundError: a target or prompts that do not go with the model.
        """
