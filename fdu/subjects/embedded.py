"""The pipelines that come with fdu: subjects with their own words, probes and judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import fdu
from fdu.concepts import Concept, ConceptType, Pair, concept_pairs, has_prompts, weighted
from fdu.storage.loading import erased_pairs
from fdu.subjects.subject import Exam, Panel, Subject, clip_encoder

if TYPE_CHECKING:
    from fdu.config import EraseConfig
    from fdu.evaluation import Probe, Sampling
    from fdu.evaluation.features import Features


class Content(Protocol):
    """The module of an embedded pipeline: what can be erased from it, and who judges it."""

    NOTES: tuple[str, ...]
    """Paragraphs that a reader of its results needs."""
    JUDGE: str
    """The judge in words."""

    def concepts(self, target: str, anchor: str) -> tuple[Concept, Concept]:
        """Target and anchor in its words, prompts aligned; ValueError for names that it does not know."""

    def check_target(self, target: str) -> None:
        """Raise ValueError for a target that it does not know."""

    def kind_of(self, target: str) -> str:
        """The type of the target for the packaged phrasings."""

    def preserved(self, *targets: str, anchors: Sequence[str] = ()) -> tuple[str, ...]:
        """Prompts to preserve when ``targets`` are erased towards ``anchors``."""

    def probes(self, target: str, *others: str, anchor: str = "") -> list[Probe]:
        """The classes that judge the erasure of ``target`` towards ``anchor``; ``others`` were erased as well."""

    def chance(self, target: str, anchor: str) -> float:
        """The share of images for the anchor that show the target by chance, such as a fox among mammals."""

    def features(self) -> Features:
        """Features for the distances between images."""


@dataclasses.dataclass(frozen=True)
class EmbeddedExam(Exam):
    """Concepts that the pipeline's own judge recognises; an encoder, if one is named, measures the distances."""

    subject: EmbeddedPipeline | None = None
    others: tuple[str, ...] = ()
    """Concepts that were erased besides the target."""
    anchor: str = ""
    """What replaced the target, where it is known."""

    def prompts(self) -> dict[str, tuple[str, ...]]:
        """See :meth:`Exam.prompts`."""
        found: dict[str, tuple[str, ...]] = {"target": (), "unseen": (), "retained": ()}
        for probe in self._probes():
            found[probe.role] = (*found.get(probe.role, ()), *probe.prompts[: 1 if probe.role == "retained" else None])
        return found

    @property
    def origin(self) -> str:
        """See :attr:`Exam.origin`."""
        return f"{self.subject.title}, version {fdu.__version__}" if self.subject else ""

    def panel(self, device: str = "cpu") -> Panel:
        """See :meth:`Exam.panel`."""
        assert self.subject is not None
        content = self.subject.content
        features = clip_encoder(self.judge, device) if self.judge else content.features()
        return Panel(self._probes(), features, content.JUDGE)

    def _probes(self) -> list[Probe]:
        assert self.subject is not None
        return self.subject.content.probes(self.target, *self.others, anchor=self.anchor)


class EmbeddedPipeline(Subject):
    """A pipeline that comes with fdu."""

    name: ClassVar[str]
    """Its name on the command line."""
    data: ClassVar[Path]
    """Its folder."""
    classifier: ClassVar[Path]
    """The weights of its judge."""
    example: ClassVar[tuple[str, str]]
    """The target and the anchor of a demo."""
    nothing: ClassVar[str]
    """The anchor that names no concept of its own."""
    light = judges_itself = True

    def __init__(self, model: str = "") -> None:
        super().__init__(model or self.name)
        self.location = str(self.data)

    @property
    def content(self) -> Content:
        """Its module, imported at first use."""
        raise NotImplementedError

    @property
    def loading_code(self) -> str:
        """See :attr:`Subject.loading_code`."""
        return f'fdu.load_pipeline("{self.name}")'

    def names(self) -> dict[str, tuple[str, ...]]:
        """What can be erased from it, by kind; imports nothing heavy."""
        raise NotImplementedError

    @property
    def known(self) -> set[str]:
        """What can be erased from it."""
        return {name for names in self.names().values() for name in names}

    @classmethod
    def answers_to(cls, model: str) -> bool:
        """Whether ``model`` names it, by name or by its folder."""
        return model == cls.name or (Path(model).is_dir() and Path(model).resolve() == cls.data.resolve())

    @property
    def sampling(self) -> Sampling:
        """20 steps at guidance 3."""
        from fdu.evaluation import Sampling

        return Sampling()

    @property
    def notes(self) -> tuple[str, ...]:
        """See :attr:`Subject.notes`."""
        return self.content.NOTES

    def pairs(
        self,
        targets: Sequence[str | Concept],
        anchors: Sequence[str | Concept],
        concept_type: ConceptType | Sequence[ConceptType] = "object",
    ) -> tuple[Pair, ...]:
        """See :meth:`Subject.pairs`; names are those of the pipeline, and ``concept_type`` does not matter."""
        pairs = super().pairs(targets, anchors, concept_type)
        if has_prompts([*targets, *anchors]):
            return pairs
        known = [self.content.concepts(target.name, anchor.name) for target, anchor in pairs]
        own = concept_pairs([target for target, _ in known], [anchor for _, anchor in known])
        return weighted(own, [target.weight for target, _ in pairs])

    def with_preserved(self, config: EraseConfig, pairs: Sequence[tuple[str, str]]) -> EraseConfig:
        """See :meth:`Subject.with_preserved`: superclasses, anchors and the neighbours of the targets."""
        targets, anchors = [target for target, _ in pairs], [anchor for _, anchor in pairs]
        if config.preservation_prompts or not {*targets, *anchors} <= {*self.known, self.nothing}:
            return config
        return dataclasses.replace(config, preservation_prompts=self.content.preserved(*targets, anchors=anchors))

    def exam(
        self,
        target: str | None,
        erased: Sequence[str] = (),
        prompts: str | Path | None = None,
        record: Mapping[str, Any] | None = None,
        judge: str | None = None,
        target_judge: str | None = None,
    ) -> Exam:
        """See :meth:`Subject.exam`."""
        for name, given in (("prompts", prompts), ("target_judge", target_judge)):
            if given is not None:
                raise ValueError(f"{name}: {self.title} has its own; leave it out")
        self.content.check_target(target or "")
        others = tuple(name for name in erased if name != target)
        kind = self.content.kind_of(target or "")
        anchor = dict(erased_pairs(record)).get(target or "", "") if record else ""
        anchor = anchor if anchor in self.known else ""
        return EmbeddedExam(target or "", kind, judge, subject=self, others=others, anchor=anchor)


class Digits(EmbeddedPipeline):
    """Handwritten digits in coloured ink: the fastest pipeline, for tests."""

    name, title = "digits", "the digits pipeline of fdu"
    data = Path(__file__).parent / "digits" / "data" / "pipeline"
    classifier = data.with_name("classifier.safetensors")
    example, nothing = ("three", "eight"), "digit"

    @property
    def content(self) -> Content:
        """See :attr:`EmbeddedPipeline.content`."""
        from fdu.subjects.digits import pipeline

        return cast(Content, pipeline)

    def names(self) -> dict[str, tuple[str, ...]]:
        """See :meth:`EmbeddedPipeline.names`."""
        from fdu.subjects.digits.vocabulary import DIGITS, INKS

        return {"digit": DIGITS, "ink": INKS}


class Emoji(EmbeddedPipeline):
    """195 animals, plants and foods in four styles; no penalty separates their text embeddings."""

    name, title = "emoji", "the emoji pipeline of fdu"
    data = Path(__file__).parent / "emoji" / "data" / "pipeline"
    classifier = data.with_name("classifier.safetensors")
    example, nothing = ("fox", "wolf"), "emoji"

    @property
    def content(self) -> Content:
        """See :attr:`EmbeddedPipeline.content`."""
        from fdu.subjects.emoji import emoji_pipeline

        return cast(Content, emoji_pipeline)

    @property
    def sampling(self) -> Sampling:
        """20 steps at guidance 2: a larger scale overshoots some styles and backgrounds."""
        from fdu.evaluation import Sampling

        return Sampling(guidance_scale=2.0)

    def names(self) -> dict[str, tuple[str, ...]]:
        """See :meth:`EmbeddedPipeline.names`; objects are by their narrow superclass."""
        from fdu.subjects.emoji.objects import STYLES, SUPERCLASSES, THINGS, members

        narrow = dict.fromkeys(thing.superclasses[0] for thing in THINGS)
        objects = {kind: tuple(thing.name for thing in members(kind)) for kind in narrow}
        return {**objects, "superclass": SUPERCLASSES, "style": STYLES}


EMBEDDED: tuple[type[EmbeddedPipeline], ...] = (Emoji, Digits)
"""The one for demos first."""
