"""The robustness tests of one erasure, each run before and after it."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

from accelerate.utils import release_memory
from diffusers import DiffusionPipeline
from torch import Tensor

from fdu.evaluation import Probe
from fdu.evaluation.robustness.attack import AttackConfig, AttackFigures, attack
from fdu.evaluation.robustness.finetuning import Lesson
from fdu.evaluation.robustness.judging import JudgedSampling, target_latents
from fdu.evaluation.robustness.phrasings import PromptSets, SetFigures, compare_sets, seen_in_sets
from fdu.evaluation.robustness.relearning import RelearningConfig, RelearningFigures, relearn
from fdu.models.denoiser import Denoiser
from fdu.models.families import denoiser_of


@dataclasses.dataclass(frozen=True)
class Robustness:
    """The results of an examination; None for a test that was not run."""

    phrasings: dict[str, SetFigures] | None = None
    """By prompt set."""
    attack_before: AttackFigures | None = None
    """The same attack before the erasure, for reference."""
    attack: AttackFigures | None = None
    """The attack on the erased pipeline."""
    relearning: RelearningFigures | None = None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


class Test(Protocol):
    """A test, which keeps what it has to compare with."""

    def before(self, exam: Examination, denoiser: Denoiser) -> None:
        """Look at the pipeline before the erasure."""

    def after(self, exam: Examination, denoiser: Denoiser) -> dict[str, Any]:
        """Test the erased pipeline and leave it as it was. Returns fields of :class:`Robustness`."""


class _Phrasings:
    def before(self, exam: Examination, denoiser: Denoiser) -> None:
        self.seen = seen_in_sets(denoiser, exam.sets, exam.probe.judge, exam.drawing)

    def after(self, exam: Examination, denoiser: Denoiser) -> dict[str, Any]:
        seen = seen_in_sets(denoiser, exam.sets, exam.probe.judge, exam.drawing)
        return {"phrasings": compare_sets(exam.sets, exam.probe.name, self.seen, seen)}


class _Attack:
    def before(self, exam: Examination, denoiser: Denoiser) -> None:
        found = attack(exam.lesson(denoiser), dataclasses.replace(exam.attack_config, restarts=1))
        exam.drawn_before = found.before.value
        self.reference = found.against(exam.drawn_before)

    def after(self, exam: Examination, denoiser: Denoiser) -> dict[str, Any]:
        return {"attack_before": self.reference, "attack": attack(exam.lesson(denoiser), exam.attack_config)}


class _Relearning:
    def before(self, exam: Examination, denoiser: Denoiser) -> None:
        lesson = exam.lesson(denoiser)
        if exam.drawn_before is None:
            exam.drawn_before = lesson.judged().value

    def after(self, exam: Examination, denoiser: Denoiser) -> dict[str, Any]:
        return {"relearning": relearn(exam.lesson(denoiser), exam.relearning_config)}


TESTS: dict[str, type[Test]] = {"phrasings": _Phrasings, "attack": _Attack, "relearning": _Relearning}
"""The tests by name, in the order in which they are made."""


class Examination:
    """The tests of one erasure: call :meth:`before` with the original pipeline, then :meth:`after` with the erased one.

    The two need not be in memory together; one pipeline can serve as both, as with ``result.original()``.
    A test that fails does not stop the others; :meth:`check` tells of it.

    Args:
        probe: the target's prompts and their judge.
        sets: prompt sets for "phrasings", from :func:`read_sets`.
        tests: the tests to run, from ``TESTS``.
        attack_config, relearning_config: settings of these tests.
        drawing: how judged images are drawn.
        latents: number of images of the target for attack and relearning, >= 1.

    Raises:
        ValueError: an unknown test, none, or phrasings without a prompt set.
    """

    def __init__(
        self,
        probe: Probe,
        sets: PromptSets | None = None,
        tests: Collection[str] = tuple(TESTS),
        attack_config: AttackConfig | None = None,
        relearning_config: RelearningConfig | None = None,
        drawing: JudgedSampling | None = None,
        latents: int = 32,
    ) -> None:
        unknown = [name for name in tests if name not in TESTS]
        if unknown or not tests:
            got = f"got {unknown[0]!r}" if unknown else "got none"
            raise ValueError(f"robustness must name tests among {', '.join(TESTS)}; {got}")
        if "phrasings" in tests and not sets:
            raise ValueError(
                "the test 'phrasings' needs prompt sets; read them with fdu.evaluation.robustness.read_sets"
            )
        self.probe, self.sets, self.number = probe, sets or {}, latents
        self.attack_config = attack_config or AttackConfig()
        self.relearning_config = relearning_config or RelearningConfig()
        self.drawing = drawing or JudgedSampling()
        self.tests = {name: kind() for name, kind in TESTS.items() if name in tests}
        self.found: Robustness | None = None
        """What the finished tests found."""
        self.latents: Tensor | None = None
        self.drawn_before: float | None = None
        """The share of images that showed the target before the erasure, once attack or relearning has counted it."""
        self._begun = False
        # Words, not exceptions: their frames would hold the memory that the next test needs.
        self._failed: dict[str, str] = {}
        self._traces: list[str] = []

    def before(self, pipeline: DiffusionPipeline) -> None:
        """Draw the target's images and what the later figures are compared with."""
        self._begun = True
        for name, test in self.tests.items():
            self._tried(name, test.before, pipeline)

    def each_after(self, pipeline: DiffusionPipeline) -> Iterator[None]:
        """Test the erased pipeline, which is as before afterwards; yields whenever ``found`` is up to date.

        Raises:
            RuntimeError: :meth:`before` was not called.
        """
        if not self._begun:
            raise RuntimeError("call before() with the pipeline as it was before the erasure, then after()")
        for name, test in self.tests.items():
            found = None if name in self._failed else self._tried(name, test.after, pipeline)
            if found:
                self.found = dataclasses.replace(self.found or Robustness(), **found)
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
        """What attack and relearning learn from: images of the target by the first pipeline that was asked."""
        if self.latents is None:
            self.latents = target_latents(denoiser, self.probe, self.number, self.drawing)
        known = 1.0 if self.drawn_before is None else self.drawn_before
        return Lesson(denoiser, self.probe, self.latents, self.drawing, known)

    def _tried(self, name: str, make: Callable[[Examination, Denoiser], Any], pipeline: DiffusionPipeline) -> Any:
        """What ``make`` returns; None if it fails, which is noted."""
        try:
            return make(self, denoiser_of(pipeline))
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            self._failed[name] = f"{name!r} failed: {line or type(error).__name__}"
            self._traces.append(traceback.format_exc())
        release_memory()
        return None
