"""The robustness tests of one erasure, each run before and after it."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from accelerate.utils import release_memory
from diffusers import DiffusionPipeline
from torch import Tensor

from fdu.config import Size
from fdu.evaluation.drawing import JudgedSampling, Probe
from fdu.evaluation.robustness.attack import AttackConfig, AttackFigures, attack
from fdu.evaluation.robustness.image_attacks import from_partial_noise, inpainting
from fdu.evaluation.robustness.phrasings import PromptSets, SetFigures, compare_sets, seen_in_sets
from fdu.evaluation.robustness.relearning import (
    AttackOutcome,
    Lesson,
    RelearningConfig,
    RelearningFigures,
    invert,
    relearn,
    target_latents,
)
from fdu.evaluation.robustness.word_attacks import bred_words, search_words
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of


@dataclasses.dataclass(frozen=True)
class Robustness:
    """The results of an examination; None for a test that was not run."""

    phrasings: dict[str, SetFigures] | None = None
    """The figures by prompt set."""
    attack_before: AttackFigures | None = None
    """The same attack before the erasure, for reference."""
    attack: AttackFigures | None = None
    """The attack on the erased pipeline."""
    relearning: RelearningFigures | None = None
    others_before: dict[str, AttackOutcome] | None = None
    """Further attacks by name, on the pipeline before the erasure."""
    others: dict[str, AttackOutcome] | None = None
    """The same on the erased pipeline."""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def _seen(exam: Examination, denoiser: Denoiser) -> dict[str, list[str]]:
    return seen_in_sets(denoiser, exam.sets, exam.probe.judge, exam.drawing)


def _compare_sets(exam: Examination, denoiser: Denoiser, before: dict[str, list[str]]) -> dict[str, Any]:
    return {"phrasings": compare_sets(exam.sets, exam.probe.name, before, _seen(exam, denoiser))}


def _attack_before(exam: Examination, denoiser: Denoiser) -> AttackFigures:
    found = attack(exam.lesson(denoiser), dataclasses.replace(exam.attack_config, restarts=1))
    exam.drawn_before = found.before.value
    return found.against(exam.drawn_before)


def _attack(exam: Examination, denoiser: Denoiser, before: AttackFigures) -> dict[str, Any]:
    return {"attack_before": before, "attack": attack(exam.lesson(denoiser), exam.attack_config)}


def _count_before(exam: Examination, denoiser: Denoiser) -> None:
    lesson = exam.lesson(denoiser)
    if exam.drawn_before is None:
        exam.drawn_before = lesson.judged().value


def _relearn(exam: Examination, denoiser: Denoiser, before: None) -> dict[str, Any]:
    return {"relearning": relearn(exam.lesson(denoiser), exam.relearning_config)}


def _other(name: str, begin: Callable[[Lesson], _Attack]) -> _Test:
    """One of the further attacks, which ``begin`` makes of the pipeline before the erasure."""

    def before(exam: Examination, denoiser: Denoiser) -> tuple[_Attack, AttackOutcome]:
        _count_before(exam, denoiser)
        lesson = exam.lesson(denoiser)
        attack = begin(lesson)
        return attack, attack(lesson)

    def after(exam: Examination, denoiser: Denoiser, before: tuple[_Attack, AttackOutcome]) -> dict[str, Any]:
        found, (attack, reference) = exam.found or Robustness(), before
        return {
            "others_before": {**(found.others_before or {}), name: reference},
            "others": {**(found.others or {}), name: attack(exam.lesson(denoiser))},
        }

    return _Test(before, after)


_Attack = Callable[[Lesson], AttackOutcome]


class _Test(NamedTuple):
    before: Callable[[Examination, Denoiser], Any]
    """Looks at the pipeline before the erasure; ``after`` gets what it returns."""
    after: Callable[[Examination, Denoiser, Any], dict[str, Any]]
    """Tests the erased pipeline and leaves it unchanged. Returns fields of :class:`Robustness`."""


TESTS = {
    "phrasings": _Test(_seen, _compare_sets),
    "attack": _Test(_attack_before, _attack),
    "relearning": _Test(_count_before, _relearn),
    "words": _other("words", lambda _: search_words),
    "direction": _other("direction", lambda lesson: bred_words(lesson).tried),
    "inversion": _other("inversion", lambda _: invert),
    "partial_noise": _other("partial_noise", lambda _: from_partial_noise),
    "inpainting": _other("inpainting", lambda _: inpainting),
}
"""The tests by name, in the order in which they run."""
USUAL = ("phrasings", "attack", "relearning")
"""Those that run if none is named."""


class Examination:
    """The tests of one erasure: call :meth:`before` with the original pipeline, then :meth:`after` with the erased one.

    The two need not be in memory together; one pipeline can serve as both, as with ``result.original()``.
    A test that fails does not stop the others; :meth:`check` reports it.

    Args:
        probe: the target's prompts and their judge.
        sets: prompt sets for "phrasings", from :func:`read_sets`.
        tests: the tests to run, from ``TESTS``.
        attack_config, relearning_config: settings of these tests.
        drawing: how judged images are drawn.
        latents: number of images of the target for attack and relearning, >= 1.
        size: pixels of an image: the side of a square, or (height, width). None: the model's own.

    Raises:
        ValueError: an unknown test, none, or phrasings without a prompt set.
    """

    def __init__(
        self,
        probe: Probe,
        sets: PromptSets | None = None,
        tests: Collection[str] = USUAL,
        attack_config: AttackConfig | None = None,
        relearning_config: RelearningConfig | None = None,
        drawing: JudgedSampling | None = None,
        latents: int = 32,
        size: Size | None = None,
    ) -> None:
        unknown = [name for name in tests if name not in TESTS]
        if unknown or not tests:
            got = repr(unknown[0]) if unknown else "none"
            raise ValueError(f"robustness must name tests among {', '.join(TESTS)}; got {got}")
        if "phrasings" in tests and not sets:
            raise ValueError(
                "the test 'phrasings' needs prompt sets; read them with fdu.evaluation.robustness.read_sets"
            )
        self.probe, self.sets, self.number = probe, sets or {}, latents
        self.attack_config = attack_config or AttackConfig()
        self.relearning_config = relearning_config or RelearningConfig()
        self.drawing = drawing or JudgedSampling()
        self.size = size
        self.tests = {name: test for name, test in TESTS.items() if name in tests}
        self.found: Robustness | None = None
        """The results of the finished tests."""
        self.latents: Tensor | None = None
        self.drawn_before: float | None = None
        """The share of images that showed the target before the erasure, once attack or relearning has counted it."""
        self._before: dict[str, Any] | None = None
        # Words, not exceptions: their frames would hold the memory that the next test needs.
        self._failed: dict[str, str] = {}
        self._traces: list[str] = []

    def before(self, pipeline: DiffusionPipeline) -> None:
        """Draw the target's images and what the later figures are compared with."""
        self._before = {}
        for name, test in self.tests.items():
            with self._noting_failure(name):
                self._before[name] = test.before(self, denoiser_of(pipeline, self.size))
            release_memory()

    def each_after(self, pipeline: DiffusionPipeline) -> Iterator[None]:
        """Test the erased pipeline and leave it unchanged; yields whenever ``found`` is up to date.

        Raises:
            RuntimeError: :meth:`before` was not called.
        """
        if self._before is None:
            raise RuntimeError("call before() with the pipeline as it was before the erasure, then after()")
        for name, test in self.tests.items():
            if name in self._before:
                with self._noting_failure(name):
                    found = test.after(self, denoiser_of(pipeline, self.size), self._before[name])
                    self.found = dataclasses.replace(self.found or Robustness(), **found)
                release_memory()
            yield

    def after(self, pipeline: DiffusionPipeline) -> Robustness:
        """Test the erased pipeline, and leave it unchanged.

        Raises:
            RuntimeError: :meth:`before` was not called, or a test failed; the others are in ``found``.
        """
        for _ in self.each_after(pipeline):
            pass
        self.check()
        return self.found or Robustness()

    def notes(self) -> list[str]:
        """Sentences on the tests that failed."""
        return [f"The robustness test {told}." for told in self._failed.values()]

    def check(self) -> None:
        """Report failed tests.

        Raises:
            RuntimeError: a test failed; the cause is its traceback.
        """
        if self._failed:
            cause = RuntimeError("\n".join(self._traces))
            raise RuntimeError(f"robustness: the test {'; the test '.join(self._failed.values())}") from cause

    def lesson(self, denoiser: Denoiser) -> Lesson:
        """The lesson of attack and relearning: images of the target by the first pipeline that was asked."""
        if self.latents is None:
            self.latents = target_latents(denoiser, self.probe, self.number, self.drawing)
        known = 1.0 if self.drawn_before is None else self.drawn_before
        return Lesson(denoiser, self.probe, self.latents, self.drawing, known)

    @contextmanager
    def _noting_failure(self, name: str) -> Iterator[None]:
        """Catch and note an exception. Release memory after this context: within it, the frames are still alive."""
        try:
            yield
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            self._failed[name] = f"{name!r} failed: {line or type(error).__name__}"
            self._traces.append(traceback.format_exc())
