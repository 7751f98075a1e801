"""The engine of sweeps: what it makes and keeps, what a kill loses, and what its file looks like."""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from fdu.comparison.sweep import Job, Records, digest, settings_identity, sweep
from fdu.config import EraseConfig
from fdu.training.loop import NotFinite

SHARED = {"weights": "0123", "settings": {"steps": 40, "rate": 0.1}}


def square(number: int) -> dict[str, Any]:
    return {"square": number**2}


def lost() -> dict[str, Any]:
    raise NotFinite("the loss became nan at step 3; lower the learning rate")


def job(number: int, first: bool = False, **settings: Any) -> Job:
    identity = {**SHARED, "number": number, "settings": {**SHARED["settings"], **settings}}
    return Job(f"square {number}", identity, functools.partial(square, number), first=first)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records.jsonl"


def test_the_header_holds_what_most_share_and_a_line_what_differs(path: Path) -> None:
    jobs = [job(1), job(2), job(3, steps=80)]
    assert not sweep(jobs[:1], path, tell=lambda line: None).of("square 2", jobs[1].identity)
    sweep(jobs, path, tell=lambda line: None)
    header, *rest = lines(path)
    assert header["identity"]["settings"] == SHARED["settings"] and "torch" in header["versions"]
    assert [line["identity"] for line in rest] == [
        {"number": 1},
        {"number": 2},
        {"number": 3, "settings": {"steps": 80}},
    ]
    assert not any("versions" in line or "device" in line for line in rest)
    found = Records(path).of("square 3", jobs[2].identity)
    assert found is not None and found["square"] == 9 and found["identity"] == jobs[2].identity
    assert found["device"] == header["device"]


def test_a_record_that_lacks_an_entry_of_the_header_is_written_whole(path: Path) -> None:
    before = Job("before", {"weights": "0123"}, functools.partial(square, 0), first=True)
    sweep([before, *map(job, range(1, 4))], path, tell=lambda line: None)
    by_name = {line.get("name"): line for line in lines(path)}
    assert by_name["before"]["whole"] and by_name["before"]["identity"] == before.identity
    assert Records(path).found["before"]["identity"] == before.identity


def test_what_is_there_is_not_made_again_and_a_changed_setting_is(path: Path) -> None:
    told: list[str] = []
    sweep([job(1), job(2)], path, tell=told.append)
    sweep([job(1), job(2)], path, tell=told.append)
    assert told == ["1/2 square 1", "2/2 square 2"]
    content = path.read_text()
    sweep([job(1), job(2, rate=0.2)], path, tell=told.append)
    assert told[2:] == ["1/1 square 2"] and path.read_text() != content
    records = Records(path)
    assert records.of("square 2", job(2).identity) is None and records.of("square 1", job(1).identity)
    sweep([job(1), job(2, rate=0.2), job(3)], path, tell=told.append)  # the replaced line goes
    assert [line.get("name") for line in lines(path)] == [None, "square 1", "square 2", "square 3"]


def test_a_line_cut_short_is_ignored_and_rewritten(path: Path) -> None:
    sweep(list(map(job, range(4))), path, tell=lambda line: None)
    whole = path.read_text()
    path.write_text(whole[:-25])
    assert list(Records(path).found) == ["square 0", "square 1", "square 2"]
    told: list[str] = []
    sweep(list(map(job, range(4))), path, tell=told.append)
    assert told == ["1/1 square 3"]
    assert path.read_text() == whole


def test_a_loss_that_is_not_finite_leaves_a_record_and_is_not_repeated(path: Path) -> None:
    jobs = [job(1), Job("lost", SHARED, lost)]
    told: list[str] = []
    sweep(jobs, path, tell=told.append)
    sweep(jobs, path, tell=told.append)
    assert len(told) == 2
    assert Records(path).found["lost"]["failed"] == "the loss became nan at step 3"


def test_first_jobs_come_first_and_most_counts_the_others(path: Path) -> None:
    told: list[str] = []
    sweep([job(1), job(2), job(3), job(0, first=True)], path, most=2, tell=told.append)
    assert told == ["1/3 square 0", "2/3 square 1", "3/3 square 2"]


def test_a_setting_that_a_record_lacks_had_its_default(path: Path) -> None:
    def erasure(**settings: Any) -> Job:
        identity = {"settings": settings_identity(EraseConfig(**settings))}
        return Job("erasure", identity, functools.partial(square, 1))

    older = erasure()
    del older.identity["settings"]["rank"]
    sweep([older], path, tell=lambda line: None)
    records = Records(path)
    assert records.of("erasure", erasure().identity) is not None
    assert records.of("erasure", erasure(rank=2).identity) is None
    # Also once others of the file have that setting, and most of them another value.
    others = [Job(f"other {n}", erasure(rank=2).identity, functools.partial(square, n)) for n in range(3)]
    sweep([older, *others], path, tell=lambda line: None)
    assert lines(path)[0]["identity"]["settings"]["rank"] == 2
    assert Records(path).of("erasure", erasure(rank=2).identity) is None


def test_records_know_settings_by_their_former_names(path: Path) -> None:
    found = settings_identity(EraseConfig(sampling_guidance=2.0))
    assert found["guidance_scale"] == 2.0 and "sampling_guidance" not in found
    sweep([Job("old", {"settings": {"guidance_scale": 2.0}}, functools.partial(square, 1))], path)
    assert Records(path).of("old", {"settings": found}) is not None
    assert Records(path).of("old", {"settings": settings_identity(EraseConfig())}) is None


def test_prompts_to_preserve_are_told_apart_by_a_digest() -> None:
    one, other = (settings_identity(EraseConfig(preservation_prompts=(word,))) for word in ("a cat", "a dog"))
    assert one["preservation_prompts"] == digest(["a cat"]) != other["preservation_prompts"]
    assert settings_identity(EraseConfig())["preservation_prompts"] == []
    assert "tracking_dir" not in settings_identity(EraseConfig())


def test_infinite_figures_become_null(path: Path) -> None:
    sweep([Job("wild", SHARED, functools.partial(dict, value=float("inf")))], path, tell=lambda line: None)
    assert Records(path).found["wild"]["value"] is None and lines(path)[1]["value"] is None


def numbered(number: int, killed: bool = False) -> Job:
    def make() -> dict[str, Any]:
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"number": number}

    return Job(f"job {number}", {"number": number}, make)


def test_a_kill_loses_one_job_at_most(path: Path) -> None:
    jobs = [numbered(number, killed=number == 2) for number in range(4)]
    child = multiprocessing.get_context("fork").Process(target=sweep, args=(jobs, path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert list(Records(path).found) == ["job 0", "job 1"]
    told: list[str] = []
    sweep(list(map(numbered, range(4))), path, tell=told.append)
    assert told == ["1/2 job 2", "2/2 job 3"]


def test_a_job_that_fails_costs_no_other_that_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads for processes, which take seconds to start."""

    def threads(workers: int, *others: Any) -> concurrent.futures.Executor:
        return concurrent.futures.ThreadPoolExecutor(workers)

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", threads)

    def broken() -> dict[str, Any]:
        raise OSError("no such encoder")

    def late() -> dict[str, Any]:
        time.sleep(0.2)
        return square(2)

    jobs = [Job("broken", SHARED, broken), Job("late", SHARED, late), job(1)]
    with pytest.raises(OSError, match="encoder"):
        sweep(jobs, path, workers=2, tell=lambda line: None)
    assert Records(path).found["late"]["square"] == 4  # it was running meanwhile


def test_two_sweeps_do_not_share_a_file(path: Path) -> None:
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="file of records '.*' is in use by another run"):
            sweep([job(1)], path)
    sweep([job(1)], path, tell=lambda line: None)


@pytest.mark.parametrize("damage", ["{", "[]", "\xff"])
def test_records_with_a_damaged_header_are_made_again(path: Path, damage: str) -> None:
    sweep([job(1), job(2)], path, tell=lambda line: None)
    _, *rest = path.read_text().splitlines()
    path.write_bytes((damage + "\n" + "\n".join(rest) + "\n").encode("latin-1"))
    told: list[str] = []
    sweep([job(1), job(2)], path, tell=told.append)
    assert len(told) == 2
