"""The engine of every sweep: named jobs, and their records in one JSON Lines file. A kill loses one job at most."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fdu.comparison.launchers import Launcher, Processes, WorkerDied
from fdu.config import EraseConfig
from fdu.storage.loading import describe_device
from fdu.storage.locks import sole_use
from fdu.storage.output import to_json, write_text

ATTEMPTS = 3
"""How often a job is begun whose workers die."""

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One record to make."""

    name: str
    """The name of its record, unique in a sweep."""
    identity: Record
    """Everything that the figures depend on except versions and device, ready for JSON."""
    make: Callable[[], Record]
    """Returns the figures, ready for JSON. It is pickled for worker processes."""
    device: str = "cpu"
    first: bool = False
    """All other jobs wait for it."""


class Records:
    """The records in a JSON Lines file.

    The first line, the header, holds the entries that most records share: settings, device and versions. Every other
    line holds a record's name, its figures, and the entries that differ from the header. A record that lacks an entry
    of the header is written with all its entries and marked ``whole``. If two lines have the same name, the later one
    counts. An incomplete line, as a kill leaves it, is ignored.

    Attributes:
        found: all records by name, each merged with the header.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Record = {}
        self.found: dict[str, Record] = {}
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if not isinstance(line, dict):
                continue
            name = line.pop("name", None)
            if name is None:
                self.header = line
            elif isinstance(name, str):
                record = line if line.pop("whole", False) else _merged(copy.deepcopy(self.header), line)
                if _is_record(record):  # else it is damaged, or the header is
                    self.found[name] = record

    def of(self, name: str, identity: Record) -> Record | None:
        """The record of this name if it was made with this identity, else None."""
        record = self.found.get(name)
        if record is None:
            return None
        # A setting that a record lacks did not exist when it was made; the run used its default.
        settings = {**settings_identity(EraseConfig()), **record["identity"].get("settings", {})}
        found = {**record["identity"], "settings": settings}
        return record if _holds(found, json.loads(to_json(identity))) else None

    def add(self, name: str, record: Record, jobs: Sequence[Job]) -> None:
        """Write a record: as one more line, or with the whole file if it is the first."""
        first = not self.found or not self.path.is_file()
        self.found[name] = json.loads(to_json(record))
        if first:
            return self.write(jobs)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(self._line(name))
            file.flush()
            os.fsync(file.fileno())

    def write(self, jobs: Sequence[Job]) -> None:
        """Write the whole file, with a header that fits these jobs."""
        conditions = [{"device": one["device"], "versions": one["versions"]} for one in self.found.values()]
        self.header = {"identity": _usual([job.identity for job in jobs]), **_usual(conditions)}
        write_text(self.path, to_json(self.header) + "\n" + "".join(map(self._line, self.found)))

    def _line(self, name: str) -> str:
        record = self.found[name]
        line = _differences(self.header, record)
        if _merged(self.header, line) != record:  # it lacks an entry of the header
            line = {"whole": True, **record}
        return to_json({"name": name, **line}) + "\n"


def sweep(
    jobs: Sequence[Job],
    path: Path,
    workers: int = 1,
    most: int | None = None,
    tell: Callable[[str], None] = print,
    launcher: Launcher | None = None,
) -> Records:
    """Make the records that are missing or were made with another identity.

    A job whose loss became NaN or infinite leaves a record with ``failed``, and is not repeated. A job whose worker
    died is made again, by a Ray cluster or Slurm at once, otherwise by the next sweep.

    Args:
        jobs: the records to make.
        path: the JSON Lines file of the records.
        workers: number of processes, each with one thread if there are several; only this process writes.
        most: the largest number of jobs to make, not counting those that go first.
        tell: gets a line per record, and per worker that died.
        launcher: where the jobs run. None: in ``workers`` processes.

    Raises:
        BlockingIOError: another process is writing the file.
        OSError: a record cannot be written.
        RuntimeError: workers died, or a job failed elsewhere; all written records stay.
        KeyboardInterrupt: a signal asked for it; all written records stay.
    """
    with sole_use(path.with_suffix(".lock"), f"the file of records {str(path)!r}"):
        records = Records(path)
        todo = [job for job in jobs if records.of(job.name, job.identity) is None]
        parts = [job for job in todo if job.first], [job for job in todo if not job.first][:most]
        done, total = 0, sum(map(len, parts))
        if not total:
            return records
        if records.found:
            records.write(jobs)
        launcher = launcher or (Processes(workers) if workers > 1 else Launcher())
        running: dict[Any, Job] = {}
        wait = True
        launcher.start()
        try:
            for part in filter(None, parts):
                for job, record in _made(part, launcher, running, tell):
                    records.add(job.name, record, jobs)
                    done += 1
                    tell(f"{done}/{total} {job.name}")
        except KeyboardInterrupt:
            wait = False
            raise
        finally:
            try:
                for handle in launcher.stop(running, wait):  # jobs that others finished while one failed
                    found: Record = {}
                    with suppress(Exception, KeyboardInterrupt):
                        found = launcher.result(handle)
                    if found:
                        records.add(running[handle].name, found, jobs)
            finally:
                launcher.close()
        return records


def digest(content: Any) -> str:
    """16 digits that identify content too long to repeat in every record."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def settings_identity(settings: EraseConfig) -> Record:
    """The settings of an erasure as a part of an identity: no folders, and a digest for the prompts to preserve."""
    found = settings.recorded()
    prompts = found["preservation_prompts"]
    return {**found, "preservation_prompts": digest(prompts) if prompts else []}


def _made(
    jobs: Sequence[Job], launcher: Launcher, running: dict[Any, Job], tell: Callable[[str], None]
) -> Iterator[tuple[Job, Record]]:
    """Every job with its record as soon as it is made; ``running`` holds the jobs still in progress."""

    def submit(*some: Job) -> None:
        works = [functools.partial(_record, job) for job in some]
        running.update(zip(launcher.submit(works), some, strict=True))

    deaths: collections.Counter[str] = collections.Counter()
    submit(*jobs)
    while running:
        for handle in launcher.ended(running):
            job = running.pop(handle)
            try:
                record = launcher.result(handle)
            except WorkerDied as died:
                deaths[job.name] += 1
                if deaths[job.name] == ATTEMPTS:
                    raise RuntimeError(
                        f"{job.name}: its worker died {ATTEMPTS} times ({died}). Give a job more memory or time; the "
                        "finished jobs are recorded, and the same command makes the others"
                    ) from None
                tell(f"{job.name}: its worker died ({died}); another begins it again")
                submit(job)
            else:
                yield job, record


def _record(job: Job) -> Record:
    # Not at the top: who submits jobs or reads records need not wait for these.
    from fdu.storage.fingerprint import versions
    from fdu.training.loop import NotFinite

    try:
        figures = job.make()
    except NotFinite as error:
        figures = {"failed": str(error).split(";")[0]}
    return {"identity": job.identity, **figures, "device": describe_device(job.device), "versions": versions()}


def _usual(entries: Sequence[Record]) -> Record:
    """The values that more than half of the entries share; nested dicts value by value."""
    found: Record = {}
    for key in dict.fromkeys(key for entry in entries for key in entry):
        values = [entry[key] for entry in entries if key in entry]
        if all(isinstance(value, dict) for value in values):
            found |= {key: _usual(values)} if 2 * len(values) > len(entries) else {}
        else:
            ((text, count),) = collections.Counter(map(to_json, values)).most_common(1)
            found |= {key: json.loads(text)} if 2 * count > len(entries) else {}
    return found


def _differences(common: Record, own: Record) -> Record:
    """The entries of ``own`` that ``common`` lacks or has with another value; :func:`_merged` undoes it."""
    return {
        key: _differences(common[key], value) if _nested(common, key, value) else value
        for key, value in own.items()
        if key not in common or common[key] != value
    }


def _is_record(found: Record) -> bool:
    """Whether it has what every record has."""
    parts = [found.get(key) for key in ("identity", "versions")]
    parts += [part["settings"] for part in parts if isinstance(part, dict) and "settings" in part]
    return "device" in found and all(isinstance(part, dict) for part in parts)


def _merged(common: Record, own: Record) -> Record:
    both = {key: _merged(common[key], value) for key, value in own.items() if _nested(common, key, value)}
    return {**common, **own, **both}


def _nested(common: Record, key: str, value: Any) -> bool:
    return isinstance(value, dict) and isinstance(common.get(key), dict)


def _holds(found: Record, wanted: Record) -> bool:
    """Whether ``found`` has every entry of ``wanted``; it may have more."""
    return isinstance(found, dict) and all(
        key in found and (_holds(found[key], value) if isinstance(value, dict) else found[key] == value)
        for key, value in wanted.items()
    )
