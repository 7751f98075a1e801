"""Ctrl-C or a scheduler's SIGTERM during a step: noted at once, obeyed after the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Whether a signal asked to stop. A plain flag: the lock of an event could deadlock a handler."""

    noted = False


@contextmanager
def noticed() -> Iterator[Interruption]:
    """Within this context the first signal is noted instead of being obeyed; a second one does not wait.

    In threads other than the main one signals are not seen.
    """
    asked = Interruption()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.noted:
            raise KeyboardInterrupt
        asked.noted = True

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    former = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in former.items():
            if handler is not None:  # one that was not set by Python cannot be set again
                signal.signal(number, handler)
