"""Ctrl-C or a scheduler's SIGTERM during a step: noted at once, obeyed after the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def noticed() -> Iterator[threading.Event]:
    """Within this context the first signal sets the event instead of being obeyed; a second one does not wait.

    In threads other than the main one signals are not seen.
    """
    asked = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

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
