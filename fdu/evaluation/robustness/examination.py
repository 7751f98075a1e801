"""The robustness tests of one erasure, each run before and after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, get_args

from diffusers import DiffusionPipeline
from torch import Tensor

from fdu.evaluation import Probe
from fdu.evaluation.robustness.attack import AttackConfig, AttackFigures, attack
from fdu.evaluation.robustness.finetuning import Lesson
from fdu.evaluation.robustness.judging import JudgedSampling, count, target_latents
from fdu.evaluation.robustness.phrasings import PromptSets, SetFigures, compare_sets, seen_in_sets
from fdu.evaluation.robustness.relearning import RelearningConfig, RelearningFigures, relearn
from fdu.models.families import denoiser_of

Test = Literal["phrasings", "attack", "relearning"]
TESTS: tuple[Test, ...] = get_args(Test)


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


class Examination:
    """The tests of one erasure: call :meth:`before` with the original pipeline, then :meth:`after` with the erased one.

    The two need not be in memory together; one pipeline can serve as both, as with ``result.original()``.

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
        tests: Collection[str] = TESTS,
        attack_config: AttackConfig | None = None,
        relearning_config: RelearningConfig | None = None,
        drawing: JudgedSampling | None = None,
        latents: int = 32,
    ) -> None:
        check_tests(tests)
        if "phrasings" in tests and not sets:
            raise ValueError(
                "the test 'phrasings' needs prompt sets; read them with fdu.evaluation.robustness.read_sets"
            )
        self.probe, self.sets, self.tests = probe, sets or {}, tuple(tests)
        self.attack_config = attack_config or AttackConfig()
        self.relearning_config = relearning_config or RelearningConfig()
        self.drawing, self.number = drawing or JudgedSampling(), latents
        self.seen: dict[str, list[str]] = {}
        self.latents: Tensor | None = None
        self.attack_before: AttackFigures | None = None
        self.drawn_before: float | None = None

    def before(self, pipeline: DiffusionPipeline) -> None:
        """Draw the target's images and what the later figures are compared with."""
        denoiser = denoiser_of(pipeline)
        if "phrasings" in self.tests:
            self.seen = seen_in_sets(denoiser, self.sets, self.probe.judge, self.drawing)
        if set(self.tests) & {"attack", "relearning"}:
            self.latents = target_latents(denoiser, self.probe, self.number, self.drawing)
            if "attack" in self.tests:
                config = dataclasses.replace(self.attack_config, restarts=1)
                found = attack(Lesson(denoiser, self.probe, self.latents, self.drawing), config)
                plain = found.before
                self.attack_before = found.against(plain.value)
            else:
                plain = count(denoiser, self.probe, self.drawing)
            self.drawn_before = plain.value

    def after(self, pipeline: DiffusionPipeline) -> Robustness:
        """Test the erased pipeline, and leave it unchanged.

        Raises:
            RuntimeError: :meth:`before` was not called.
        """
        if not self.seen and self.latents is None:
            raise RuntimeError("call before() with the pipeline as it was before the erasure, then after()")
        denoiser = denoiser_of(pipeline)
        phrasings = attacked = relearnt = None
        if "phrasings" in self.tests:
            seen = seen_in_sets(denoiser, self.sets, self.probe.judge, self.drawing)
            phrasings = compare_sets(self.sets, self.probe.name, self.seen, seen)
        if self.latents is not None:
            known = 1.0 if self.drawn_before is None else self.drawn_before
            lesson = Lesson(denoiser, self.probe, self.latents, self.drawing, known)
            if "attack" in self.tests:
                attacked = attack(lesson, self.attack_config)
            if "relearning" in self.tests:
                relearnt = relearn(lesson, self.relearning_config)
        return Robustness(phrasings, self.attack_before, attacked, relearnt)


def check_tests(tests: Collection[str]) -> None:
    """Refuse unknown tests.

    Raises:
        ValueError: an unknown test, or none.
    """
    unknown = [name for name in tests if name not in TESTS]
    if unknown or not tests:
        got = f"got {unknown[0]!r}" if unknown else "got none"
        raise ValueError(f"robustness must name tests among {', '.join(TESTS)}; {got}")
