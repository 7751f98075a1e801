"""The embedded pipeline of digits as a subject: it has its own words, probes and classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdu.concepts import ConceptType, Pair, concept_pairs
from fdu.subjects.subject import Exam, Panel, Subject

if TYPE_CHECKING:
    from fdu.config import EraseConfig
    from fdu.evaluation import Sampling

NAME = "embedded"


@dataclasses.dataclass(frozen=True)
class DigitExam(Exam):
    """Digits or inks that the classifier judges; an encoder, if one is named, measures the distances."""

    others: tuple[str, ...]
    encoder: str | None

    def panel(self, device: str = "cpu") -> Panel:
        """See :meth:`Exam.panel`."""
        from fdu.evaluation.features import ClipFeatures
        from fdu.subjects.digits import pipeline

        features = ClipFeatures.load(self.encoder, device) if self.encoder else pipeline.features()
        return Panel(pipeline.probes(self.target, *self.others), features, pipeline.JUDGE)


class EmbeddedDigits(Subject):
    """The pipeline of handwritten digits in coloured ink that comes with fdu."""

    title = "the embedded pipeline of fdu"
    light = True
    judges_itself = True
    data = Path(__file__).parent / "data" / "pipeline"

    @classmethod
    def answers_to(cls, model: str) -> bool:
        """Whether ``model`` names it, by name or by its folder."""
        return model == NAME or (Path(model).is_dir() and Path(model).resolve() == cls.data.resolve())

    @property
    def location(self) -> str:
        """See :attr:`Subject.location`."""
        return str(self.data)

    @property
    def sampling(self) -> Sampling:
        """20 steps at guidance 3, as the pipeline was tuned."""
        from fdu.evaluation import Sampling

        return Sampling()

    @property
    def notes(self) -> tuple[str, ...]:
        """See :attr:`Subject.notes`."""
        from fdu.subjects.digits.pipeline import NOTES

        return NOTES

    @property
    def loading_code(self) -> str:
        """See :attr:`Subject.loading_code`."""
        return f'fdu.load_pipeline("{NAME}")'

    def pairs(
        self,
        targets: Sequence[str],
        anchors: Sequence[str],
        concept_type: ConceptType | Sequence[ConceptType] = "object",
    ) -> tuple[Pair, ...]:
        """See :meth:`Subject.pairs`; names are digits and inks, and concept_type says nothing here."""
        pairs = super().pairs(targets, anchors, concept_type)
        if any(name.endswith(".txt") for name in (*targets, *anchors)):
            return pairs
        from fdu.subjects.digits.pipeline import concepts

        given = [name.strip() for name in anchors] * (len(targets) if len(anchors) == 1 else 1)
        known = [concepts(target.strip(), anchor) for target, anchor in zip(targets, given, strict=True)]
        return concept_pairs([target for target, _ in known], [anchor for _, anchor in known])

    def with_preserved(self, config: EraseConfig, targets: Sequence[str]) -> EraseConfig:
        """See :meth:`Subject.with_preserved`: the superclass and the neighbours of the targets' own kinds."""
        from fdu.subjects.digits.pipeline import with_preserved
        from fdu.subjects.digits.vocabulary import DIGITS, INKS

        known = all(target in (*DIGITS, *INKS) for target in targets)
        return with_preserved(config, *targets) if known else config

    def exam(
        self,
        target: str | None,
        erased: Sequence[str] = (),
        prompts: str | Path | None = None,
        record: Mapping[str, Any] | None = None,
        judge: str | None = None,
    ) -> Exam:
        """See :meth:`Subject.exam`."""
        if prompts is not None:
            raise ValueError("prompts: the embedded pipeline has its own; leave it out")
        from fdu.subjects.digits.pipeline import SUPERCLASS, concepts
        from fdu.subjects.digits.vocabulary import DIGITS

        if target is None:
            raise ValueError("target is missing; name the erased digit or ink")
        concepts(target, SUPERCLASS)
        others = tuple(name for name in erased if name != target)
        return DigitExam(target, "digit" if target in DIGITS else "ink", None, others, judge)
