"""The embedded pipeline of digits as a subject: it has its own words, probes and classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdu.concepts import ConceptType, Pair, concept_pairs
from fdu.subjects.subject import Exam, Panel, Subject, clip_encoder

if TYPE_CHECKING:
    from fdu.config import EraseConfig
    from fdu.evaluation import Sampling

NAME = "embedded"


@dataclasses.dataclass(frozen=True)
class DigitExam(Exam):
    """Digits or inks that the classifier judges; an encoder, if one is named, measures the distances."""

    others: tuple[str, ...] = ()
    """Concepts that were erased besides the target."""

    def panel(self, device: str = "cpu") -> Panel:
        """See :meth:`Exam.panel`."""
        from fdu.subjects.digits import pipeline

        features = clip_encoder(self.judge, device) if self.judge else pipeline.features()
        return Panel(pipeline.probes(self.target, *self.others), features, pipeline.JUDGE)


class EmbeddedDigits(Subject):
    """The pipeline of handwritten digits in coloured ink that comes with fdu."""

    title = "the embedded pipeline of fdu"
    light = judges_itself = True
    loading_code = f'fdu.load_pipeline("{NAME}")'
    data = Path(__file__).parent / "data" / "pipeline"

    def __init__(self, model: str = NAME) -> None:
        super().__init__(model)
        self.location = str(self.data)

    @classmethod
    def answers_to(cls, model: str) -> bool:
        """Whether ``model`` names it, by name or by its folder."""
        return model == NAME or (Path(model).is_dir() and Path(model).resolve() == cls.data.resolve())

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

    def pairs(
        self,
        targets: Sequence[str],
        anchors: Sequence[str],
        concept_type: ConceptType | Sequence[ConceptType] = "object",
    ) -> tuple[Pair, ...]:
        """See :meth:`Subject.pairs`; names are digits and inks, and ``concept_type`` does not matter."""
        pairs = super().pairs(targets, anchors, concept_type)
        if any(name.endswith(".txt") for name in (*targets, *anchors)):
            return pairs
        from fdu.subjects.digits.pipeline import concepts

        known = [concepts(target.name, anchor.name) for target, anchor in pairs]
        return concept_pairs([target for target, _ in known], [anchor for _, anchor in known])

    def with_preserved(self, config: EraseConfig, targets: Sequence[str]) -> EraseConfig:
        """See :meth:`Subject.with_preserved`: the superclass and the neighbours of the targets' own kinds."""
        from fdu.subjects.digits.pipeline import preserved
        from fdu.subjects.digits.vocabulary import DIGITS, INKS

        if config.preservation_prompts or not all(target in (*DIGITS, *INKS) for target in targets):
            return config
        return dataclasses.replace(config, preservation_prompts=preserved(*targets))

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

        concepts(target or "", SUPERCLASS)
        others = tuple(name for name in erased if name != target)
        return DigitExam(target or "", "digit" if target in DIGITS else "ink", judge, others=others)
