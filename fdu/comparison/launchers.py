"""Where the jobs of a sweep run: in this process, in others on this machine, on a Ray cluster, or by Slurm."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fdu.storage.loading import check_package

LauncherName = Literal["local", "ray", "slurm"]
Work = Callable[[], dict[str, Any]]
"""Makes a record. It is pickled for other processes."""

WORKER = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Environment of worker processes: spinning threads would slow each other down; bars and notices would mix."""
LARGEST_ARRAY = 500
"""Jobs that Slurm gets at once; clusters allow a thousand or more."""
SIGN = "under-way-"
"""Start of the name of the file that stands for a sweep under way; see :class:`Elsewhere`."""


class WorkerDied(RuntimeError):
    """A worker died in the middle of a job; another may do it."""


class Launcher:
    """Runs jobs: this one in this process, one after the other, when their results are asked for.

    A handle stands for a submitted job.
    """

    def start(self) -> None:
        """Get ready."""

    def submit(self, works: Sequence[Work]) -> Sequence[Any]:
        """Start these jobs as soon as there are workers for them; one handle per job."""
        return works

    def ended(self, handles: Collection[Any]) -> Sequence[Any]:
        """Wait for one job at least; the handles of all that ended."""
        return [next(iter(handles))]

    def result(self, handle: Any) -> dict[str, Any]:
        """What a job that ended made.

        Raises:
            WorkerDied: it made nothing, by no fault of its own.
            Exception: the error of the job.
        """
        return handle()

    def stop(self, handles: Collection[Any], wait: bool) -> Sequence[Any]:
        """Start no more jobs, and wait for those that run if ``wait``; the handles of all that ended."""
        return ()

    def close(self) -> None:
        """Free what :meth:`start` took."""


class Processes(Launcher):
    """Worker processes of this machine, each with one thread."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def start(self) -> None:
        """Processes start with the first jobs."""
        context = multiprocessing.get_context("spawn")
        self.pool = concurrent.futures.ProcessPoolExecutor(self.workers, context, _end_with_parent)

    def submit(self, works: Sequence[Work]) -> Sequence[Any]:
        """One future per job."""
        with _environment_of_workers():
            return [self.pool.submit(work) for work in works]

    def ended(self, handles: Collection[Any]) -> Sequence[Any]:
        concurrent.futures.wait(handles, return_when=concurrent.futures.FIRST_COMPLETED)
        return [one for one in handles if one.done()]

    def result(self, handle: Any) -> dict[str, Any]:
        try:
            return handle.result()
        except concurrent.futures.BrokenExecutor:
            raise RuntimeError(
                "a worker process died: it was killed, or memory ran out. The finished jobs are recorded, and the same "
                "command makes the others; fewer workers need less memory"
            ) from None

    def stop(self, handles: Collection[Any], wait: bool) -> Sequence[Any]:
        self.pool.shutdown(wait=True, cancel_futures=True)
        return list(handles)


class Elsewhere(Launcher):
    """Jobs for machines that share a file system with this one.

    A file in ``folder`` stands for the sweep under way. A job that does not find it does nothing: its machine does not
    see the folder, or the sweep is over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.sign = self.folder / f"{SIGN}{uuid.uuid4().hex}"

    def start(self) -> None:
        """Put up the sign, instead of one that a killed sweep has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"{SIGN}*"):
            old.unlink(missing_ok=True)
        self.sign.touch()

    def stop(self, handles: Collection[Any], wait: bool) -> Sequence[Any]:
        """Take down the sign."""
        self.sign.unlink(missing_ok=True)
        return ()

    def carried(self, works: Sequence[Work]) -> list[Carried]:
        """The jobs as other machines do them."""
        return [Carried(work, Path.cwd(), self.sign) for work in works]

    @staticmethod
    def opened(returned: dict[str, Any] | str) -> dict[str, Any]:
        """The record that a :class:`Carried` returned; raises RuntimeError with its error."""
        if isinstance(returned, str):
            raise RuntimeError(returned)
        return returned


@dataclasses.dataclass(frozen=True)
class Carried:
    """A job for another machine. It returns an error in words, because not every error can be pickled."""

    work: Work
    working: Path
    """The working folder here, so that relative paths mean the same there."""
    sign: Path

    def __call__(self) -> dict[str, Any] | str:
        """Do the job."""
        try:
            for shared, there in ((self.sign.parent, self.sign), (self.working, self.working)):
                if not there.exists():
                    raise FileNotFoundError(
                        f"{os.uname().nodename} does not see {str(shared)!r}; start fdu in a folder on a file system "
                        "that all machines share, and write into such a one"
                    )
            os.chdir(self.working)
            return self.work()
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """In a worker: end when the process that started it has died. It would wait for jobs for ever, with its memory."""

    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(carried: Carried) -> dict[str, Any] | str:
    return carried()


class RayCluster(Elsewhere):
    """Tasks of a Ray cluster: one core each, and ``gpus`` GPUs.

    Args:
        folder: as for :class:`Elsewhere`.
        address: host:port of the cluster, "auto" for the one that this machine is part of; None starts one here.
        workers: the number of cores of a cluster that is started here. None: all.
        gpus: per job.
    """

    def __init__(self, folder: Path, address: str | None = None, workers: int | None = None, gpus: int = 0) -> None:
        super().__init__(folder)
        self.address, self.workers, self.gpus = address, workers, gpus

    def start(self) -> None:
        """Connect to the cluster."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here would report its use
        import ray

        own: dict[str, Any] = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
        with _environment_of_workers():
            ray.init(address=self.address or "local", log_to_driver=False, **own)
        if ray.cluster_resources().get("GPU", 0) < self.gpus:  # tasks would wait for ever
            ray.shutdown()
            raise RuntimeError("no machine of the Ray cluster has a GPU; choose device cpu, or another cluster")
        self.ray = ray
        # Without Ray's own attempts: the sweep tells of its attempts.
        self.task = ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=0)(_call)
        super().start()

    def submit(self, works: Sequence[Work]) -> Sequence[Any]:
        """One reference per job."""
        return [self.task.remote(one) for one in self.carried(works)]

    def ended(self, handles: Collection[Any]) -> Sequence[Any]:
        return self.ray.wait(list(handles))[0]

    def result(self, handle: Any) -> dict[str, Any]:
        try:
            returned = self.ray.get(handle)
        except self.ray.exceptions.RayError as error:
            raise WorkerDied(str(error).strip().split("\n")[0]) from None
        return self.opened(returned)

    def stop(self, handles: Collection[Any], wait: bool) -> Sequence[Any]:
        # Without the sign, jobs that have not begun end at once.
        super().stop(handles, wait)
        return self.ray.wait(list(handles), num_returns=len(handles), timeout=None if wait else 0)[0] if handles else ()

    def close(self) -> None:
        """Leave the cluster, which ends what still runs; also the cluster, if it was started here."""
        self.ray.shutdown()


class Slurm(Elsewhere):
    """Jobs of Slurm, submitted with submitit: one core each, and ``gpus`` GPUs. Their logs are in ``folder``.

    Args:
        folder: as for :class:`Elsewhere`.
        partition: of the cluster. None: its default.
        minutes: after which Slurm ends a job. None: 240.
        workers: the largest number of jobs at once. None: any.
        gpus: per job.
    """

    cluster = "slurm"
    """As submitit calls it."""
    pause = 2.0
    """Seconds between two looks at the jobs."""

    def __init__(
        self,
        folder: Path,
        partition: str | None = None,
        minutes: int | None = None,
        workers: int | None = None,
        gpus: int = 0,
    ) -> None:
        super().__init__(folder)
        given = {"slurm_partition": partition, "slurm_array_parallelism": workers}
        self.parameters = {name: value for name, value in given.items() if value is not None}
        self.parameters |= {"timeout_min": minutes or 240, "gpus_per_node": gpus, "cpus_per_task": 1, "name": "fdu"}

    def start(self) -> None:
        """Make submitit's executor."""
        import submitit

        super().start()
        self.died = submitit.core.utils.UncompletedJobError
        self.executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
        self.executor.update_parameters(**self.parameters)

    def submit(self, works: Sequence[Work]) -> Sequence[Any]:
        """One job of an array each; if one array is refused, the earlier ones are cancelled."""
        handles: list[Any] = []
        carried = self.carried(works)
        try:
            with _environment_of_workers():
                for begin in range(0, len(carried), LARGEST_ARRAY):
                    handles += self.executor.submit_array(carried[begin : begin + LARGEST_ARRAY])
        except BaseException:
            for one in handles:
                one.cancel(check=False)
            raise
        return handles

    def ended(self, handles: Collection[Any]) -> Sequence[Any]:
        while not (found := [one for one in handles if one.done()]):
            time.sleep(self.pause)
        return found

    def result(self, handle: Any) -> dict[str, Any]:
        try:
            returned = handle.result()
        except self.died:
            raise WorkerDied(f"Slurm's job {handle.job_id}: {handle.state}; log: {handle.paths.stderr}") from None
        return self.opened(returned)

    def stop(self, handles: Collection[Any], wait: bool) -> Sequence[Any]:
        super().stop(handles, wait)
        for one in handles:
            if not wait or one.state == "PENDING":
                one.cancel(check=False)
        for one in handles if wait else ():
            one.wait()
        return [one for one in handles if one.done()]


def check_launcher(name: LauncherName) -> None:
    """Refuse a launcher that cannot work here.

    Raises:
        MissingPackage: its package is not installed.
        RuntimeError: this is no machine of a Slurm cluster.
    """
    if name == "ray":
        check_package("ray", "launcher 'ray'", "'local'")
    if name == "slurm":
        check_package("submitit", "launcher 'slurm'", "'local' or 'ray'")
        if shutil.which("sbatch") is None:
            raise RuntimeError(
                "launcher 'slurm' needs sbatch, which is not on this machine's PATH; start it on a login node of the "
                "cluster, or choose 'local' or 'ray'"
            )


@contextmanager
def _environment_of_workers() -> Iterator[None]:
    """Processes that start inside have WORKER in their environment."""
    kept = {name: os.environ[name] for name in WORKER if name in os.environ}
    os.environ.update(WORKER)
    try:
        yield
    finally:
        for name in WORKER:
            del os.environ[name]
        os.environ.update(kept)
