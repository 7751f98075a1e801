"""A subject: a model that concepts are erased from, with its words, its probes and its judges.

:class:`Subject` serves any diffusers pipeline: concept sets say what to draw, and CLIP judges zero-shot. A pipeline
that comes with fdu overrides what it knows better.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdu.concepts import Concept, ConceptType, Pair, concept_pairs, read_concepts
from fdu.storage.loading import hub_name, load_model
from fdu.storage.single_file import SingleFile
from fdu.subjects.concept_sets import ConceptSet, choose_set

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fdu.config import EraseConfig
    from fdu.evaluation import Probe, Sampling
    from fdu.evaluation.features import ClipFeatures, Features


@dataclasses.dataclass(frozen=True)
class Panel:
    """The judges of one erasure, loaded."""

    probes: list[Probe]
    """The images to draw, and who judges them; a target's probe comes first."""
    features: Features
    """Features for the distances between images."""
    judge: str
    """The judge in words, for reports."""


@dataclasses.dataclass(frozen=True)
class Exam:
    """The questions that judge the erasure of one target, checked; nothing is loaded yet."""

    target: str
    kind: str
    """The type of concept for the packaged phrasings: object or style; digit, ink, emoji or emoji style."""
    judge: str | None
    """An image-text encoder by folder or hub id; None: the default."""
    concepts: ConceptSet | None = None
    """The prompts, where they do not follow from the names alone."""
    target_judge: str | None = None
    """Who judges the target's images, if not the encoder: "nudenet"."""

    @property
    def origin(self) -> str:
        """Where the prompts come from, with version, in words."""
        return self.concepts.origin if self.concepts else ""

    def prompts(self) -> dict[str, tuple[str, ...]]:
        """Prompts to try, by role: all of "target" and "unseen", one for each class that is "retained"."""
        assert self.concepts is not None
        one = self.concepts
        kept = (*one.near, one.anchor, *one.generic, *one.unrelated)
        retained = tuple(concept.prompts[0] for concept in kept)
        return {"target": one.target.prompts, "unseen": one.unseen, "retained": retained}

    def panel(self, device: str = "cpu") -> Panel:
        """Load the judges.

        Raises:
            OSError: an encoder cannot be loaded.
        """
        from fdu.evaluation.features import CLIP
        from fdu.subjects.clip_judges import clip_probes
        from fdu.subjects.nudity import NudeJudge

        assert self.concepts is not None
        encoder = clip_encoder(self.judge or CLIP, device)
        of_target = NudeJudge(self.target) if self.target_judge else None
        told = f"{encoder.name}, zero-shot" + (f"; of the target {of_target.told}" if of_target else "")
        return Panel(clip_probes(self.concepts, encoder, of_target), encoder, told)


class Subject:
    """A pipeline's folder, single file or hub id, to erase from. Making one loads nothing."""

    title = ""
    """Its name in prose, if it comes with fdu."""
    light = False
    """Whether it is small enough for one process per CPU core."""
    judges_itself = False
    """Whether it has a judge of its own, so that an encoder measures distances only."""

    def __init__(self, model: str) -> None:
        self.model = self.location = model
        """Its name for the command line, and the argument for ``from_pretrained``."""

    @property
    def sampling(self) -> Sampling:
        """How judged images are drawn by default."""
        from fdu.evaluation import Sampling

        return Sampling(num_inference_steps=None, guidance_scale=None, batch_size=4)

    @property
    def notes(self) -> tuple[str, ...]:
        """Paragraphs that a reader of its results needs."""
        from fdu.subjects.clip_judges import CLIP_NOTES

        return CLIP_NOTES

    @property
    def loading_code(self) -> str:
        """The Python expression that loads it."""
        if SingleFile.of(self.model):
            return f"fdu.load_pipeline({self.model!r})"
        name, revision = (self.model, None) if self.folder else hub_name(self.model)
        return f"DiffusionPipeline.from_pretrained({name!r}{f', revision={revision!r}' if revision else ''})"

    @property
    def folder(self) -> Path | None:
        """The folder with its configs; None for a hub id, and for a file whose configs are on the hub."""
        file = SingleFile.of(self.location)
        place = file.config if file else self.location
        return Path(place) if place and Path(place).is_dir() else None

    @property
    def places(self) -> list[Path]:
        """The files and folders of this machine that it is loaded from."""
        file = SingleFile.of(self.location)
        return [*([file.path] if file else []), *([self.folder] if self.folder else [])]

    def load(
        self,
        dtype: str = "float32",
        device: str = "cpu",
        quantization: str = "none",
        offload: bool = False,
        variant: str | None = None,
        base_lora: Sequence[str] = (),
    ) -> DiffusionPipeline:
        """Load the pipeline; see :func:`fdu.storage.loading.load_model`.

        Raises:
            OSError: it cannot be loaded; the message gives the first line of the reason.
            ValueError: its denoiser has no blocks to offload.
        """
        return load_model(self.location, dtype, device, quantization, offload, variant, base_lora)

    def pairs(
        self,
        targets: Sequence[str | Concept],
        anchors: Sequence[str | Concept],
        concept_type: ConceptType | Sequence[ConceptType] = "object",
    ) -> tuple[Pair, ...]:
        """Targets and their anchors in the words of the model: names, ``.txt`` files of prompts, or concepts.

        Raises:
            ValueError, FileNotFoundError: as ``concept_pairs``, or a name that the model does not know.
        """
        return concept_pairs(read_concepts(targets), read_concepts(anchors), concept_type)

    def with_preserved(self, config: EraseConfig, pairs: Sequence[tuple[str, str]]) -> EraseConfig:
        """The settings with the model's own prompts to preserve, if it has any and the settings name none.

        ``pairs``: the names of targets and anchors."""
        return config

    def exam(
        self,
        target: str | None,
        erased: Sequence[str] = (),
        prompts: str | Path | None = None,
        record: Mapping[str, Any] | None = None,
        judge: str | None = None,
        target_judge: str | None = None,
    ) -> Exam:
        """The questions that judge an erasure.

        Args:
            target: the erased concept; None: the one that ``prompts`` names.
            erased: all erased concepts; the others are neither retained nor lost.
            prompts: a concept set by name or file, as :func:`fdu.subjects.concept_sets.choose_set` takes it.
            record: the record of the erasure, if there is one.
            judge: an image-text encoder, by folder or hub id.
            target_judge: who judges the target's images instead: "nudenet".

        Raises:
            ValueError, FileNotFoundError: a target or prompts that do not go with the model.
        """
        concepts = choose_set(target, prompts, record).without(erased)
        styled = not target_judge and any("style" in prompt for prompt in concepts.target.prompts)
        return Exam(concepts.target.name, "style" if styled else "object", judge, concepts, target_judge)


def joint_panel(exams: Sequence[Exam], device: str = "cpu") -> Panel:
    """The judges of an erasure of several targets, loaded.

    Raises:
        OSError: an encoder cannot be loaded.
    """
    from fdu.evaluation.drawing import joint_probes

    panels = [exam.panel(device) for exam in exams]
    return dataclasses.replace(panels[0], probes=joint_probes([panel.probes for panel in panels]))


@functools.cache
def clip_encoder(name: str, device: str) -> ClipFeatures:
    """The image-text encoder of that folder or hub id, loaded once per process."""
    from fdu.evaluation.features import ClipFeatures

    return ClipFeatures.load(name, device)
