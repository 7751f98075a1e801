"""Sections of the GPU suite, each in a process and a time budget of its own; what they say goes into one record.

A section is a function of a module, in a process forked from this one, or a command. Whatever it starts belongs to its
process group and ends with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fdu.storage.output import write_json  # noqa: E402

RECORD, LOGS = "gpu_suite.json", "logs.tar.gz"
GRACE = 6.0
"""Seconds that a section may go on after its deadline, before it is killed."""
PATIENCE = 5.0
"""Seconds of its budget in which an interrupted command may say what it has found."""
LOOK = 5.0
"""Seconds after which the record has what a section has kept meanwhile."""
TAIL = 20
"""Lines of a log in the record."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the suite."""

    name: str
    seconds: float
    """The most it may take."""
    function: str = ""
    """As "module.name"; it gets a gpu_timing.Plan."""
    command: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    """Of the command."""
    after: Callable[[Path], str] | None = None
    """Called with the folder of the logs when the command has ended: what is wrong with its work, or ""."""
    spare: float = 0.0
    """If not 0, it begins only with so many seconds left over, and a run without it is complete."""


class Command:
    """A section's command, which runs from now on."""

    def __init__(self, section: Section, log: Path) -> None:
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": paths, **dict(section.environment)}
        environment.pop("TRITON_INTERPRET", None)
        self.log, self.began = log, time.monotonic()
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                section.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, preexec_fn=_interruptible,
            )  # fmt: skip

    def result(self, budget: float) -> dict[str, Any]:
        """Its exit code, None if it took longer than its budget."""
        try:
            code = self._wait(budget)
        finally:
            self.end()
        return {"exit": code, "seconds": round(time.monotonic() - self.began, 1), "tail": tail(self.log)}

    def _wait(self, budget: float) -> int | None:
        patience = min(PATIENCE, budget / 2)
        try:
            return self.process.wait(budget - patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        return None

    def end(self) -> None:
        """It and all that it started."""
        kill_group(self.process.pid)
        self.process.wait()


def _interruptible() -> None:
    """A shell that starts the suite in the background has it, and all that it starts, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_group(leader: int) -> None:
    """What is left of a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def tail(log: Path) -> list[str]:
    """The last lines."""
    return log.read_text(errors="replace").splitlines()[-TAIL:]


@dataclasses.dataclass
class Suite:
    """The record of a run, its deadline, and where it goes."""

    out: Path
    """Gets the record, and the parts and logs in one archive."""
    work: Path
    """For parts and logs meanwhile."""
    deadline: float
    """By time.monotonic()."""
    rehearsal: bool = False
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    begun: dict[str, Command] = dataclasses.field(default_factory=dict)
    """Commands that run already, by section."""

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def keep(self, stage: str, result: Any) -> None:
        """Write a section's result, whole or not at all."""
        self.record[stage] = result
        write_json(self.out / RECORD, self.record)

    def archive(self) -> None:
        """Pack parts and logs, whole or not at all."""
        partial = self.out / f".{LOGS}"
        with tarfile.open(partial, "w:gz") as packed:
            packed.add(self.work, arcname="logs")
        os.replace(partial, self.out / LOGS)

    def begin(self, section: Section) -> None:
        """Start a section's command, whose budget counts from its turn on."""
        self.begun[section.name] = Command(section, self._log(section))

    def close(self) -> None:
        """End what has begun and had no turn, and pack."""
        for command in self.begun.values():
            command.end()
        self.archive()

    def run(self, section: Section, reserved: float = math.inf) -> bool:
        """Run a section; whether it came to its end, or may be left out.

        It may take its budget and what earlier ones saved, but for ``reserved``, the seconds of those that follow.
        """
        left = self.left() - GRACE
        budget = min(max(section.seconds, left - reserved), left)
        if budget < (section.spare or (1 if self.rehearsal else 5)):
            self.keep(section.name, {"skipped": "no time left"})
        elif section.function:
            self._call(section, budget)
        elif section.command:
            self._command(section, budget)
        else:
            self.keep(section.name, {"skipped": "its program is not installed"})
        self.archive()
        return self._said(section)

    def _said(self, section: Section) -> bool:
        """Whether it succeeded, after a word about it."""
        result = self.record[section.name]
        skipped = result.get("skipped")
        succeeded = result.get("exit", 0) == 0 and result.get("complete", True) and not skipped
        how = "done" if succeeded else f"left out, {skipped}" if skipped else "NOT COMPLETE"
        print(f"{section.name}: {how}, {result.get('seconds', 0)} s", flush=True)
        lines = result.get("tail", [])
        for line in [*(lines[-2:] if succeeded else lines), *filter(None, [result.get("wrong")])]:
            print(f"  {line}", flush=True)
        return succeeded or bool(skipped and section.spare)

    def _log(self, section: Section) -> Path:
        return self.work / f"{section.name}.log"

    def _call(self, section: Section, budget: float) -> None:
        """In a forked process, which has what is imported here already and a GPU of its own."""
        part, log = self.work / f"{section.name}.json", self._log(section)
        began = time.monotonic()
        process = multiprocessing.get_context("fork").Process(
            target=_in_child, args=(section.function, part, log, began + budget, self.rehearsal)
        )
        process.start()
        assert process.pid is not None
        try:
            while process.is_alive() and (left := began + budget + GRACE - time.monotonic()) > 0:
                process.join(min(left, LOOK))
                self.keep(section.name, _read(part))
            ended = not process.is_alive()
        finally:
            kill_group(process.pid)
            process.join()
        result = _read(part)
        if not ended:
            result.update(complete=False, killed=True)
        if process.exitcode:
            result.update(complete=False, exit=process.exitcode, tail=tail(log) if log.exists() else [])
        self.keep(section.name, {**result, "seconds": round(time.monotonic() - began, 1)})

    def _command(self, section: Section, budget: float) -> None:
        if section.name not in self.begun:
            self.begin(section)
        result = self.begun.pop(section.name).result(budget)
        wrong = section.after(self.work) if section.after else ""
        if wrong:
            result.update(complete=False, wrong=wrong)
        self.keep(section.name, result)


def _read(part: Path) -> dict[str, Any]:
    """What a section has kept."""
    return json.loads(part.read_text()) if part.exists() else {"complete": False}


def _in_child(function: str, part: Path, log: Path, deadline: float, rehearsal: bool) -> None:
    """The forked process: everything printed goes into the log."""
    os.setsid()  # whoever kills its group kills the processes that it starts
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which loaders of images end their workers
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import torch

    if getattr(torch._C, "_cuda_isInBadFork", bool)():
        # Something imported has looked at the GPU before the fork: a new process, which imports everything anew.
        os.execv(sys.executable, [sys.executable, __file__, function, str(part), str(deadline)])
    _measure(function, part, deadline, rehearsal)


def _measure(function: str, part: Path, deadline: float, rehearsal: bool) -> None:
    import torch
    from gpu_timing import Plan

    if rehearsal:
        torch.set_num_threads(1)  # nothing in it is large enough for two
    module, _, name = function.rpartition(".")
    try:
        plan = Plan(deadline, lambda result: write_json(part, result), rehearsal)
        getattr(importlib.import_module(module), name)(plan)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # Without the parent's finalizers, which are not this process's to run.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _measure(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), rehearsal=False)
