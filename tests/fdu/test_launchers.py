"""Sweeps beyond this process: real workers of Ray and submitit, one of which is killed, and the options for them."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import re
import shutil
import signal
import sys
import time
import types
from collections.abc import Collection, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from in_processes import SERVER

from fdu import cli
from fdu.cli import main
from fdu.cli.program import parse
from fdu.comparison import launchers
from fdu.comparison import sweep as engine
from fdu.comparison.launchers import Elsewhere, Launcher, Processes, RayCluster, Slurm, Work, WorkerDied
from fdu.comparison.sweep import ATTEMPTS, Job, Records, sweep

COMPARE = ["compare", "digits", "--target", "three", "--anchor", "eight", "--out", "out", "--device", "cpu"]


class Mortal(Launcher):
    """In this process; the worker of a job named in ``dying`` dies as often as that says."""

    def __init__(self, **dying: int) -> None:
        self.dying, self.closed = dying, False

    def result(self, handle: Any) -> dict[str, Any]:
        found = super().result(handle)
        if self.dying.get(found["name"], 0):
            self.dying[found["name"]] -= 1
            raise WorkerDied("out of memory")
        return found

    def stop(self, handles: Collection[Any], wait: bool) -> Sequence[Any]:
        return list(handles) if wait else ()

    def close(self) -> None:
        self.closed = True


def named(name: str) -> Job:
    return Job(name, {"name": name}, functools.partial(dict, name=name))


def test_a_job_whose_worker_died_is_made_again_and_told(tmp_path: Path) -> None:
    told: list[str] = []
    launcher = Mortal(b=ATTEMPTS - 1)
    records = sweep([named("a"), named("b"), named("c")], tmp_path / "runs", tell=told.append, launcher=launcher)
    assert sorted(records.found) == ["a", "b", "c"] and launcher.closed
    deaths = [line for line in told if "died" in line]
    assert len(deaths) == ATTEMPTS - 1 and all("b: " in line and "out of memory" in line for line in deaths)


def test_a_job_that_kills_every_worker_ends_the_sweep_and_costs_no_other(tmp_path: Path) -> None:
    launcher = Mortal(a=ATTEMPTS)
    with pytest.raises(RuntimeError, match=f"a: its worker died {ATTEMPTS} times .out of memory.*memory or time"):
        sweep([named("a"), named("b")], tmp_path / "runs", tell=lambda line: None, launcher=launcher)
    assert list(Records(tmp_path / "runs").found) == ["b"] and launcher.closed


def linger(place: Path) -> dict[str, Any]:
    place.write_text(str(os.getpid()))
    time.sleep(100)
    return {}


def wait_for_workers(place: Path) -> None:
    launcher = Processes(1)
    launcher.start()
    launcher.submit([functools.partial(linger, place)])
    time.sleep(100)


def test_workers_end_with_a_sweep_that_is_killed(tmp_path: Path) -> None:
    place = tmp_path / "pid"
    process = SERVER.Process(target=wait_for_workers, args=(place,))
    process.start()
    end = time.monotonic() + 100
    while not (place.exists() and place.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    worker = Path("/proc") / place.read_text()
    assert process.pid and worker.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    end = time.monotonic() + 30
    while worker.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not worker.exists()


def test_nothing_is_started_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep([named("a")], tmp_path / "runs", tell=lambda line: None)
    launcher = Mortal()
    monkeypatch.setattr(launcher, "start", lambda: pytest.fail("started"))
    sweep([named("a")], tmp_path / "runs", launcher=launcher)


def test_the_death_of_a_process_here_costs_the_jobs_in_progress_until_the_next_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With threads for processes, which take seconds to start; the pool breaks as if a process had died."""

    class Pool(concurrent.futures.ThreadPoolExecutor):
        def __init__(self, workers: int, *others: Any) -> None:
            super().__init__(1)

    def dying() -> dict[str, Any]:
        raise BrokenProcessPool

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Pool)
    told: list[str] = []
    with pytest.raises(RuntimeError, match="worker process died.*same command makes the others; fewer workers"):
        sweep([named("a"), Job("b", {"name": "b"}, dying)], tmp_path / "runs", workers=2, tell=told.append)
    sweep([named("a"), named("b")], tmp_path / "runs", workers=2, tell=told.append)
    assert told == ["1/2 a", "1/1 b"]


def ray_cluster(folder: Path) -> Elsewhere:
    pytest.importorskip("ray")
    return RayCluster(folder, workers=2)


def test_a_cluster_without_gpus_is_refused_before_its_tasks_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = {"init": lambda **named: None, "cluster_resources": lambda: {"CPU": 2.0}, "shutdown": lambda: None}
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(**cluster))
    with pytest.raises(RuntimeError, match="has a GPU; choose device cpu"):
        RayCluster(tmp_path, gpus=1).start()


def local_submitit(folder: Path) -> Elsewhere:
    submitit = pytest.importorskip("submitit")
    submitit.Job._results_timeout_s = 0  # seconds that a shared file system may need to show a result
    launcher = Slurm(folder, minutes=5)
    launcher.cluster, launcher.pause = "local", 0.05
    return launcher


@pytest.mark.slow
@pytest.mark.parametrize("make", [ray_cluster, local_submitit])
def test_two_workers_share_the_jobs_and_the_death_of_one_loses_nothing(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)

    def record(job: Job) -> dict[str, Any]:
        """Jobs 0 and 1 wait for each other; 1 kills its first worker, and 4 fails."""
        number = job.identity["number"]
        began = Path(f"began {number}")
        fresh, end = not began.exists(), time.time() + 60
        began.touch()
        while number < 2 and not Path(f"began {1 - number}").exists():
            assert time.time() < end, "the other job has not begun"
            time.sleep(0.02)
        if number == 1 and fresh:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            raise LookupError("no such encoder")
        figures = {"threads": os.environ["OMP_NUM_THREADS"], "process": os.getpid()}
        return {"identity": job.identity, **figures, "device": "cpu", "versions": {}}

    # Travels as code, being a function in a function. The engine's own imports torch and diffusers in every worker.
    monkeypatch.setattr(engine, "_record", record)
    jobs = [Job(f"job {number}", {"number": number}, dict) for number in range(5)]
    told: list[str] = []
    records = sweep(jobs[:4], Path("runs"), tell=told.append, launcher=make(Path("jobs")))
    assert len(records.found) == 4 and all(one["threads"] == "1" for one in records.found.values())
    assert str(os.getpid()) not in {str(one["process"]) for one in records.found.values()}
    (death,) = [line for line in told if "died" in line]
    assert death.startswith("job 1: ") and "begins it again" in death
    with pytest.raises(RuntimeError, match="LookupError: 'no such encoder'|LookupError: no such encoder"):
        sweep(jobs, Path("runs"), tell=told.append, launcher=make(Path("jobs")))
    assert len(Records(Path("runs")).found) == 4 and not [*Path("jobs").glob(f"{launchers.SIGN}*")]


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    class Here(Elsewhere):
        def submit(self, works: Sequence[Work]) -> Sequence[Any]:
            shutil.rmtree(self.folder)  # as if it were another machine's
            return self.carried(works)

        def result(self, handle: Any) -> dict[str, Any]:
            return self.opened(handle())

    jobs = tmp_path / "jobs"
    with pytest.raises(RuntimeError, match=f"does not see '{jobs}'; start fdu in a folder on a file system"):
        sweep([named("a")], tmp_path / "runs", launcher=Here(jobs))


def test_jobs_of_a_sweep_that_was_killed_do_nothing(tmp_path: Path) -> None:
    killed, begun = Elsewhere(tmp_path), Elsewhere(tmp_path)
    killed.start()
    (left,) = killed.carried([functools.partial(dict, a=1)])
    begun.start()
    (own,) = begun.carried([functools.partial(dict, a=1)])
    assert own() == {"a": 1} and "does not see" in str(left())
    begun.stop((), wait=True)
    assert "does not see" in str(own())


def test_slurm_gets_what_the_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch would read, with a stand-in for it and for srun."""
    pytest.importorskip("submitit")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun"):
        (programs / name).write_text('#!/bin/sh\ncp "$1" sbatch.txt\necho Submitted batch job 7\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    words = ["--launcher", "slurm", "--slurm_partition", "a100", "--slurm_minutes", "30", "--workers", "2"]
    compare: Any = parse([*COMPARE[:-1], "cuda", *words])
    launcher = compare._launcher(compare._device())
    launcher.start()
    assert [job.job_id for job in launcher.submit([dict, dict])] == ["7_0", "7_1"]
    asked = set(re.findall(r"^#SBATCH --(\S+)$", Path("sbatch.txt").read_text(), re.MULTILINE))
    wanted = {"partition=a100", "time=30", "gpus-per-node=1", "cpus-per-task=1", "array=0-1%2", "job-name=fdu"}
    assert wanted <= asked and list(Path("out/jobs").iterdir())


def test_slurm_cancels_what_it_took_if_it_refuses_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    for name, does in {
        "sbatch": "test -e taken && exit 1; touch taken; echo Submitted batch job 7",
        "srun": "",
        "scancel": 'echo "$1" >> cancelled.txt',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launchers, "LARGEST_ARRAY", 2)
    slurm = Slurm(tmp_path / "jobs")
    slurm.start()
    with pytest.raises(RuntimeError):
        slurm.submit([dict, dict, dict])
    assert Path("cancelled.txt").read_text().split() == ["7_0", "7_1"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--launcher ray --device auto", "name cuda, for one GPU per run, or cpu"),
        ("--launcher ray --device cuda:1", "'cuda:1' does not say"),
        ("--ray_address auto", "ray_address has no effect without --launcher ray"),
        ("--launcher ray --slurm_minutes 3", "slurm_minutes has no effect without --launcher slurm"),
        ("--launcher ray --ray_address auto --workers 2", "leave out workers or ray_address"),
        ("--launcher slurm --slurm_minutes 0", "slurm_minutes must be"),
        ("--launcher ray", "launcher 'ray' needs ray.*pip install ray, or choose 'local'"),
        ("--launcher slurm", "launcher 'slurm' needs submitit.*pip install submitit"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    assert main([*COMPARE, *words.split()]) == cli.USAGE
    assert re.search(told, capsys.readouterr().err) and not Path("out").exists()


def test_slurm_needs_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", sys)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*COMPARE, "--launcher", "slurm"]) == cli.USAGE
    assert "sbatch, which is not on this machine's PATH; start it on a login node" in capsys.readouterr().err


def test_the_comparison_runs_where_the_launcher_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With GPUs that this machine lacks: only the machines of the launcher load the model there."""
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []

    def started(jobs: Sequence[Job], path: Path, workers: int, launcher: Launcher) -> Records:
        asked.append((launcher, {job.device for job in jobs}))
        raise KeyboardInterrupt

    monkeypatch.setattr(launchers, "check_package", lambda *arguments: None)
    monkeypatch.setattr(engine, "sweep", started)
    command = [*COMPARE[:-1], "cuda", "--launcher", "ray", "--ray_address", "head:6379", "--seeds", "1"]
    assert main(command) == cli.INTERRUPTED
    ((launcher, devices),) = asked
    assert isinstance(launcher, RayCluster) and (launcher.address, launcher.gpus) == ("head:6379", 1)
    assert devices == {"cuda"} and launcher.folder == tmp_path / "out" / "jobs"
