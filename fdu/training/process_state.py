"""Process state that a run borrows and restores: an Accelerator, torch's random state and choice of algorithms, the
handlers of signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin, patch_environment

from fdu.config import EraseConfig
from fdu.training.sharding import LAUNCHER_FLAG

SIGNALS = (signal.SIGINT, signal.SIGTERM)
CUBLAS_VARIABLE, CUBLAS_VALUE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
"""With this variable cuBLAS is deterministic; torch reads it at the first matrix product of the process."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within this context torch's random numbers follow the seed; outside they are the user's."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Within this context, if it is wanted, torch uses only algorithms that give the same bits on every run.

    Raises:
        RuntimeError: matrix products on the device are not deterministic, and it is too late to make them so.
    """
    if not wanted:
        yield
        return
    choices: Any = torch.utils.deterministic
    mode, filling = torch.get_deterministic_debug_mode(), choices.fill_uninitialized_memory
    searching = torch.backends.cudnn.benchmark
    variable = {CUBLAS_VARIABLE: os.environ.get(CUBLAS_VARIABLE, CUBLAS_VALUE)}
    with patch_environment(**variable):
        try:
            torch.use_deterministic_algorithms(True)
            choices.fill_uninitialized_memory = False  # nothing here reads any
            torch.backends.cudnn.benchmark = False  # its choice depends on timings
            _multiply(device)
            yield
        finally:
            torch.set_deterministic_debug_mode(mode)
            choices.fill_uninitialized_memory = filling
            torch.backends.cudnn.benchmark = searching


def _multiply(device: torch.device) -> None:
    one = torch.ones(1, 1, device=device)
    try:
        one @ one
    except RuntimeError as error:
        raise RuntimeError(
            f"deterministic needs {CUBLAS_VARIABLE}={CUBLAS_VALUE} in the environment before the first matrix product "
            "of the process; set it and start again"
        ) from error


@contextmanager
def own_accelerator(config: EraseConfig, device: torch.device) -> Iterator[Accelerator]:
    """An Accelerator for this erasure alone: accelerate would keep device and precision of a process's first one."""
    states = (AcceleratorState, PartialState, GradientState)
    kept = [dict(state._shared_state) for state in states]
    for state in states:
        state._reset_state()
    try:
        with patch_environment(**{LAUNCHER_FLAG: "false"}):  # accelerate would shard a second time
            accelerator = Accelerator(
                mixed_precision=config.mixed_precision,
                cpu=device.type == "cpu",
                device_placement=False,  # the pipeline is where its user put it
                log_with=None if config.report_to == "none" else config.report_to,
                project_dir=config.tracking_dir,
                # The loop accumulates by itself, whatever the launcher's environment says.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            )
        yield accelerator
    finally:
        for state, content in zip(states, kept, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)


class Interruption:
    """Whether Ctrl-C or a scheduler's SIGTERM asked to stop. A flag, because a lock could deadlock a handler."""

    noted = False


_ASKED: list[Interruption] = []
"""Those of the contexts that are open, the innermost last."""


@contextmanager
def noticed() -> Iterator[Interruption]:
    """Within this context the first signal is only noted, and obeyed after the step; the second interrupts at once.

    Only the main thread sees signals.
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
    _ASKED.append(asked)
    try:
        yield asked
    finally:
        _ASKED.pop()
        if asked.noted and _ASKED:
            _ASKED[-1].noted = True  # the run around this one obeys
        for number, handler in former.items():
            if handler is not None:  # one that was not set by Python cannot be set again
                signal.signal(number, handler)
