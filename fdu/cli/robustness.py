"""The robustness tests of ``fdu evaluate``, one after the other, so that a failing test does not stop the others."""

from __future__ import annotations

import dataclasses
import gc
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fdu.evaluation.robustness import Examination, Robustness


class RobustnessTests:
    """Tests of robustness by name, each an examination of its own.

    Call :meth:`before` with the pipeline as it was, then :meth:`after` as it is, and in the end :meth:`check`.
    """

    def __init__(self, examinations: Mapping[str, Examination]) -> None:
        self.examinations = examinations
        self.found: Robustness | None = None
        """What the tests that are done found."""
        # Words, not exceptions: their frames would hold the memory that the next test needs.
        self._failed: dict[str, str] = {}
        self._traces: dict[str, str] = {}

    def before(self, pipeline: DiffusionPipeline) -> None:
        """Draw what the tests compare with."""
        attacked = self.examinations.get("attack")
        for test, examination in self.examinations.items():
            if test == "relearning" and attacked is not None and attacked.drawn_before is not None:
                # What the attack drew and counted serves it as well.
                examination.latents, examination.drawn_before = attacked.latents, attacked.drawn_before
            else:
                self._tried(test, examination.before, pipeline)

    def after(self, pipeline: DiffusionPipeline) -> Iterator[None]:
        """Test the erased pipeline; yields whenever a test is done, or has failed."""
        for test, examination in self.examinations.items():
            if test not in self._failed:
                found = self._tried(test, examination.after, pipeline)
                if found is not None:
                    parts = {name: part for name, part in vars(found).items() if part is not None}
                    self.found = dataclasses.replace(self.found or found, **parts)
            yield

    def notes(self) -> list[str]:
        """What a reader has to know of tests that failed."""
        return [f"The robustness test {told}." for told in self._failed.values()]

    def check(self) -> None:
        """Tell of failed tests, in the end.

        Raises:
            RuntimeError: a test failed; the cause is its traceback.
        """
        if self._failed:
            cause = RuntimeError("\n".join(self._traces.values()))
            raise RuntimeError(f"robustness: the test {'; the test '.join(self._failed.values())}") from cause

    def _tried(self, test: str, make: Callable[[DiffusionPipeline], Any], pipeline: DiffusionPipeline) -> Any:
        """What ``make`` returns; None if it fails, which is noted."""
        try:
            return make(pipeline)
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            self._failed[test] = f"{test!r} failed: {line or type(error).__name__}"
            self._traces[test] = traceback.format_exc()
        free_memory()
        return None


def free_memory() -> None:
    """Give back what nobody holds any more; pipelines hold themselves in rings, so that counting references is not
    enough."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
