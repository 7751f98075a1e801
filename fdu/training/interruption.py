"""Ctrl-C or a scheduler's SIGTERM during a step: noted at once, obeyed after the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """The first signal is noted; a second one does not wait."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def noticed() -> Iterator[Interruption]:
    """Within this context signals are noted instead of obeyed; in threads other than the main one they are not seen."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    former = {number: signal.signal(number, interruption.note) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in former.items():
            if handler is not None:  # one that was not set by Python cannot be set again
                signal.signal(number, handler)
