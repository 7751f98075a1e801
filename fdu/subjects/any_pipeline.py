"""Any diffusers pipeline as a subject: concept sets say what to draw, and CLIP judges zero-shot."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdu.subjects.concept_sets import ConceptSet, choose_set
from fdu.subjects.subject import Exam, Panel, Subject

if TYPE_CHECKING:
    from fdu.evaluation import Sampling
    from fdu.evaluation.features import ClipFeatures


@dataclasses.dataclass(frozen=True)
class ClipExam(Exam):
    """A concept set that an image-text encoder judges."""

    concepts: ConceptSet
    judge: str | None

    def panel(self, device: str = "cpu") -> Panel:
        """See :meth:`Exam.panel`."""
        from fdu.evaluation.features import CLIP
        from fdu.subjects.clip_judges import clip_probes

        encoder = _encoder(self.judge or CLIP, device)
        return Panel(clip_probes(self.concepts, encoder), encoder, f"{encoder.name}, zero-shot")


class AnyPipeline(Subject):
    """A pipeline's folder or hub id."""

    @property
    def location(self) -> str:
        """See :attr:`Subject.location`."""
        return self.model

    @property
    def sampling(self) -> Sampling:
        """The pipeline's own defaults."""
        from fdu.evaluation import Sampling

        return Sampling(num_inference_steps=None, guidance_scale=None, batch_size=4)

    @property
    def notes(self) -> tuple[str, ...]:
        """How CLIP judges."""
        from fdu.subjects.clip_judges import CLIP_NOTES

        return CLIP_NOTES

    @property
    def loading_code(self) -> str:
        """See :attr:`Subject.loading_code`."""
        return f"DiffusionPipeline.from_pretrained({self.model!r})"

    def exam(
        self,
        target: str | None,
        erased: Sequence[str] = (),
        prompts: str | Path | None = None,
        record: Mapping[str, Any] | None = None,
        judge: str | None = None,
    ) -> Exam:
        """See :meth:`Subject.exam`."""
        concepts = choose_set(target, prompts, record).without(erased)
        kind = "style" if any("style" in prompt for prompt in concepts.target.prompts) else "object"
        digest = hashlib.sha256(repr(concepts).encode()).hexdigest()[:16]
        return ClipExam(concepts.target.name, kind, digest, concepts, judge)


@functools.cache
def _encoder(judge: str, device: str) -> ClipFeatures:
    from fdu.evaluation.features import ClipFeatures

    return ClipFeatures.load(judge, device)
