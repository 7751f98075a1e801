"""Sections of the GPU suite, each in a process and a time budget of its own; what they say goes into one record.

A section is a command, and whatever it starts belongs to its process group and ends with it. A command that measures
(gpu_timing.main) finds in its environment where to keep its rows and until when it may run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fdu.storage.output import write_json  # noqa: E402

RECORD, LOGS = "gpu_suite.json", "logs.tar.gz"
GRACE = 6.0
"""Seconds after its budget in which an interrupted section may say what it has found, before it is killed."""
LOOK = 5.0
"""Seconds between looks at what a section has kept meanwhile."""
TAIL = 20
"""Lines of a log in the record."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the suite."""

    name: str
    seconds: float
    """The most it may take."""
    command: tuple[str, ...]
    """Empty where its program is not installed."""
    measures: bool = False
    """Whether it keeps rows; it looks at its deadline itself."""
    environment: tuple[tuple[str, str], ...] = ()
    after: Callable[[Path], str] | None = None
    """Called with the folder of the logs when the command has ended: what is wrong with its work, or ""."""
    spare: float = 0.0
    """If not 0, it begins only with so many seconds left over, and a run without it is complete."""


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
    begun: dict[str, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)
    """Processes that run already, by section."""

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

    def begin(self, section: Section, budget: float = math.inf) -> None:
        """Start a section's process. Begun early, its budget counts from its turn on."""
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        told = {"PYTHONPATH": paths, "FDU_PART": str(self.work / f"{section.name}.json")}
        told["FDU_DEADLINE"] = str(time.monotonic() + budget)
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        with (self.work / f"{section.name}.log").open("w") as stream:
            self.begun[section.name] = subprocess.Popen(
                section.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                env={**environment, **told, **dict(section.environment)}, preexec_fn=_interruptible,
            )  # fmt: skip

    def close(self) -> None:
        """End what has begun and had no turn, and pack."""
        for process in self.begun.values():
            end(process)
        self.archive()

    def run(self, section: Section, reserved: float = math.inf) -> bool:
        """Run a section; whether it came to its end, or may be left out.

        It may take its budget and what earlier ones saved, but for ``reserved``, the seconds of those that follow.
        """
        left = self.left() - GRACE
        budget = min(max(section.seconds, left - reserved), left)
        if budget < (section.spare or (1 if self.rehearsal else 5)):
            self.keep(section.name, {"skipped": "no time left"})
        elif section.command:
            self.keep(section.name, self._result(section, budget))
        else:
            self.keep(section.name, {"skipped": "its program is not installed"})
        self.archive()
        return self._said(section)

    def _result(self, section: Section, budget: float) -> dict[str, Any]:
        """Wait for a section's process, interrupt it when its budget is spent, and kill what is left of it."""
        began = time.monotonic()
        if section.name not in self.begun:
            self.begin(section, budget)
        process = self.begun.pop(section.name)
        try:
            while process.poll() is None and (left := began + budget - time.monotonic()) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, LOOK))
                if section.measures:
                    self.keep(section.name, self._part(section))
            code = process.poll()
            if code is None:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                code = process.poll() if section.measures else None
        finally:
            end(process)
        result = self._part(section) if section.measures else {}
        if code != 0 or not section.measures:
            log = (self.work / f"{section.name}.log").read_text(errors="replace")
            result.update(exit=code, tail=log.splitlines()[-TAIL:])
        if code != 0 and section.measures:
            result["complete"] = False
        try:
            wrong = section.after(self.work) if section.after else ""
        except Exception as error:  # costs this section, not those that follow
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            result.update(complete=False, wrong=wrong)
        return {**result, "seconds": round(time.monotonic() - began, 1)}

    def _part(self, section: Section) -> dict[str, Any]:
        """What a section has kept."""
        part = self.work / f"{section.name}.json"
        return json.loads(part.read_text()) if part.exists() else {"complete": False}

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


def _interruptible() -> None:
    """A shell that starts the suite in the background has it, and all that it starts, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes]) -> None:
    """A section's process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)  # one that is stuck in the driver does not end
