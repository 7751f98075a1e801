"""The GPU suite, rehearsed on the CPU: every section at toy size, budgets that hold, promises that can fail."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import candidates
import gpu_bounds
import gpu_losses
import gpu_runner
import gpu_suite
import gpu_timing
import gpu_training
import host_levels
import pytest
import torch
from gpu_records import a_record, losses

SUITE = Path(gpu_suite.__file__)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked, memory is read from /proc")


def test_all_sections_fit_into_nine_minutes() -> None:
    wanted = gpu_suite.sections(rehearsal=False)
    assert sum(section.seconds for section in wanted) <= 9 * 60 - gpu_runner.GRACE
    names = [section.name for section in wanted]
    assert len(set(names)) == len(names)
    assert {"large", "latents", "sd15", "sdxl", "host", "sweep", "tests", "sanitizer", "compiled"} < set(names)
    assert names[:3] == ["build", "machine", "tests"] and names[-1] == "compiled"


def test_the_sanitizer_sees_every_way_through_the_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "--import-mode=importlib"]
    chosen = subprocess.run(
        [*command, "tests/gpu", "-k", gpu_suite.SANITIZED], cwd=gpu_suite.ROOT, capture_output=True, text=True
    ).stdout
    wanted = (
        "golden_values",
        "golden_critics",
        "(7, 4, 33, 35)",
        "strides",
        "run[{}-(3, 1000003)",
        "is_the_gradient[{}",
    )
    for name, backend in itertools.product(wanted, ("triton", "cuda")):
        lines = [line for line in chosen.splitlines() if name.format(backend) in line and f"[{backend}" in line]
        assert lines, f"no {name} of {backend} in\n{chosen}"
    assert len([line for line in chosen.splitlines() if "::" in line]) <= 16


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rehearsal_runs_every_section(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--out", str(tmp_path), "--rehearsal"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = json.loads((tmp_path / gpu_suite.RECORD).read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {gpu_runner.RECORD, gpu_runner.LOGS}
    assert {"logs/build.log", "logs/large.json", "logs/tests.log"} <= set(archived(tmp_path))
    for section in gpu_suite.sections(True):
        assert section.name in record and "skipped" not in record[section.name]
    machine = record["machine"]
    assert (
        machine["torch"] == torch.__version__ and machine["backends"]["triton"] is None and len(machine["commit"]) >= 7
    )

    for name in ("large", "latents", "sweep"):
        rows = record[name]["rows"]
        assert rows and record[name]["complete"] and not [row for row in rows if "error" in row]
        candidates = {row["candidate"] for row in rows}
        assert {"clone", "triton value_and_grad", "cpu value_and_grad"} <= candidates
        if name != "sweep":
            assert {"eager", "compiled", "triton autograd"} <= candidates
        assert all(row["share_of_copy"] > 0 for row in rows if "value_and_grad" in row["candidate"])
    assert all(row["wall_us"] > 0 for row in record["latents"]["rows"])
    assert {row["backend"] for row in record["host"]["rows"]} == {"triton", "cpu"}
    for model in ("sd15", "sdxl"):
        rows = record[model]["rows"]
        assert [row["loop"] for row in rows] == ["reference", "fdu"]
        for row in rows:
            assert row["step_s"] > 0 and row["loss_us"] > 0 and isinstance(row["peak_mib"], float)
    assert record["codegen"]["exit"] == 0 and "passed" in record["codegen"]["tail"][-1]


def archived(folder: Path) -> list[str]:
    with tarfile.open(folder / gpu_runner.LOGS) as packed:
        return packed.getnames()


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_runner.Suite:
    """A minute of rehearsal; what hangs is killed soon."""
    monkeypatch.setattr(gpu_runner, "GRACE", 0.2)
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    return gpu_runner.Suite(tmp_path / "out", tmp_path / "work", time.monotonic() + 60, rehearsal=True)


def run(suite: gpu_runner.Suite, body: str, seconds: float) -> dict[str, Any]:
    """Run a section whose function has this body, and return its result."""
    (suite.work / "imagined.py").write_text(
        f"import os, subprocess, time\n\ndef run(plan):\n    plan.keep({{'rows': [1]}})\n    {body}\n"
    )
    sys.path.insert(0, str(suite.work))
    try:
        outcome = suite.run(gpu_runner.Section("imagined", seconds, "imagined.run"))
    finally:
        sys.path.remove(str(suite.work))
        sys.modules.pop("imagined", None)
    kept = json.loads((suite.out / gpu_runner.RECORD).read_text())["imagined"]
    assert outcome == kept.get("complete", True)
    return kept


def test_a_section_that_hangs_is_killed_and_keeps_what_it_had(suite: gpu_runner.Suite) -> None:
    kept = run(suite, "subprocess.Popen(['sleep', '62.5']); time.sleep(60)", 1.0)
    assert kept["killed"] and not kept["complete"] and kept["rows"] == [1] and kept["seconds"] < 20
    assert_gone(b"62.5")
    assert {"logs/imagined.json", "logs/imagined.log"} <= set(archived(suite.out))


def test_the_record_has_what_a_section_kept_before_it_ends(
    suite: gpu_runner.Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_runner, "LOOK", 0.1)
    seen: list[Any] = []
    keep = suite.keep
    monkeypatch.setattr(suite, "keep", lambda stage, result: (seen.append(dict(result)), keep(stage, result)))
    run(suite, "time.sleep(1)", 20.0)
    assert {"rows": [1]} in seen[:-1]


def test_a_section_that_dies_loses_no_other(suite: gpu_runner.Suite) -> None:
    kept = run(suite, "os._exit(6)", 5.0)
    assert kept["exit"] == 6 and not kept["complete"] and kept["rows"] == [1]


def command(script: str, seconds: float = 2.0, **more: Any) -> gpu_runner.Section:
    return gpu_runner.Section("imagined", seconds, command=(sys.executable, "-c", script), **more)


@pytest.mark.parametrize("where", ["foreground", "background"])
def test_a_command_that_hangs_may_say_what_it_has_and_ends_with_its_children(
    where: str, suite: gpu_runner.Suite
) -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN) if where == "background" else None
    try:
        _hang(suite)
    finally:
        if former is not None:
            signal.signal(signal.SIGINT, former)


def _hang(suite: gpu_runner.Suite) -> None:
    script = """
import subprocess
try:
    subprocess.run(["sleep", "61.5"])
except KeyboardInterrupt:
    print("3 passed")
"""
    assert not suite.run(command(script, 6.0))
    assert suite.record["imagined"]["exit"] is None and suite.record["imagined"]["tail"] == ["3 passed"]
    assert_gone(b"61.5")


def test_a_command_that_goes_on_after_an_interruption_is_killed(suite: gpu_runner.Suite) -> None:
    script = """
import signal, subprocess
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("begun", flush=True)
subprocess.run(["sleep", "63.5"])
"""
    assert not suite.run(command(script))
    assert suite.record["imagined"]["exit"] is None and suite.record["imagined"]["seconds"] < 30
    assert_gone(b"63.5")


def assert_gone(argument: bytes) -> None:
    """No process has this argument, or soon none."""
    end = time.monotonic() + 20  # a killed process stays in the table until somebody has collected it
    while (left := _running(argument)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not left


def _running(argument: bytes) -> list[bytes]:
    """The command lines with this argument; those that end meanwhile are left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return [command for command in found if argument in command.split(b"\0")]


def test_a_command_begun_early_is_waited_for_and_judged(suite: gpu_runner.Suite) -> None:
    early = command("print('built')", 20.0, after=lambda logs: f"lacks {(logs / 'imagined.log').read_text().strip()}")
    suite.begin(early)
    assert not suite.run(early) and not suite.begun
    assert suite.record["imagined"]["exit"] == 0 and suite.record["imagined"]["wrong"] == "lacks built"


@pytest.mark.parametrize(
    "told, cuda, wrong",
    [
        ("cuda: for 9.0 by nvcc 13.0\narchitectures: 9.0\n", True, ""),
        ("cuda: the build with nvcc failed\narchitectures: \n", True, "no CUDA kernels: the build with nvcc failed"),
        ("cuda: there was no nvcc\narchitectures: \n", False, ""),
        ("fdu_kernels has no compiled kernels: there is no C++ compiler", True, "no CUDA kernels: see the logs"),
    ],
)
def test_a_build_without_cuda_kernels_has_failed_where_there_is_a_gpu(
    told: str, cuda: bool, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, logs = tmp_path / "fdu_kernels" / "0123" / "build", tmp_path / "logs"
    for folder in (made, logs):
        folder.mkdir(parents=True)
    (made / "build.log").write_text("nvcc says")
    (made.parent / "failure.txt").write_text("it failed")
    (logs / "build.log").write_text(told)
    assert gpu_suite.judge_build(logs, cuda) == wrong
    assert (logs / "build-0123-build.log").read_text() == "nvcc says"
    assert (logs / "build-0123-failure.txt").read_text() == "it failed"


def test_without_time_nothing_starts(suite: gpu_runner.Suite) -> None:
    suite.rehearsal, suite.deadline = False, time.monotonic() + 1
    assert not suite.run(gpu_runner.Section("late", 10, command=("false",)))
    assert suite.record["late"] == {"skipped": "no time left"}
    assert suite.run(gpu_runner.Section("spare", 0, command=("false",), spare=150))


def test_an_interrupted_run_ends_its_sections_and_packs_its_logs(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(SUITE.parent)!r})
import gpu_suite
gpu_suite.preload = dict
gpu_suite.sections = lambda rehearsal: [gpu_suite.Section("long", 60, command=("sleep", "64.5"))]
sys.exit(gpu_suite.main())
"""
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", script, "--out", str(out)])
    end = time.monotonic() + 100
    while not _running(b"64.5") and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == gpu_suite.INTERRUPTED
    assert json.loads((out / gpu_runner.RECORD).read_text())["interrupted"]
    assert "logs/long.log" in archived(out) and len(list(out.iterdir())) == 2
    assert_gone(b"64.5")


def test_what_cannot_be_imported_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imagined_failure.py").write_text("raise RuntimeError('Failed to import')")
    monkeypatch.syspath_prepend(tmp_path)
    assert gpu_suite.preload(("json", "imagined_failure")) == {"imagined_failure": "RuntimeError: Failed to import"}


def test_the_commit_may_come_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDU_COMMIT", "abc")
    monkeypatch.setattr(gpu_suite, "_output", lambda command: "")
    assert gpu_suite.source() == {"commit": "abc", "changed": None}
    monkeypatch.delenv("FDU_COMMIT")
    monkeypatch.setattr(gpu_suite, "_output", lambda command: "def" if "rev-parse" in command else " M file")
    assert gpu_suite.source() == {"commit": "def", "changed": True}


def test_unknown_sections_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--out", str(tmp_path), "--only", "lattents"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "lattents; there are build, machine" in done.stderr


def test_only_backends_that_take_tensors_of_the_device_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates.fk, "backends", lambda: dict.fromkeys(("cuda", "cpu", "torch")))
    assert candidates.fused_backends("cpu") == ["cpu"] and candidates.fused_backends() == ["cuda", "cpu"]
    monkeypatch.setattr(type(candidates.backend_named("cuda")), "_why_unusable", lambda self, index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert candidates.fused_backends("cuda") == ["cuda"]


def plan_of(kept: list[Any], seconds: float = 100, rehearsal: bool = True) -> gpu_timing.Plan:
    return gpu_timing.Plan(time.monotonic() + seconds, kept.append, rehearsal)


def test_a_backend_that_fails_loses_no_other_figures_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shape: Any, name: str, *_: Any) -> dict[str, Any]:
        if name == "triton":
            raise RuntimeError("no such device")
        return {"backend": name}

    monkeypatch.setattr(host_levels, "measure", measure)
    monkeypatch.setattr(gpu_losses, "fused_backends", lambda device: ["triton", "cpu"])
    gpu_losses.host(plan_of(kept := []))
    failed, fine = kept[-1]["rows"]
    assert failed["error"] == "RuntimeError: no such device" and fine == {"backend": "cpu"} and kept[-1]["complete"]


@pytest.mark.parametrize("size, cache, count", [(1 << 17, 50 << 20, 1600), (1 << 16, 50 << 20, 2048), (1 << 30, 1, 2)])
def test_inputs_rotate_through_several_caches(size: int, cache: int, count: int) -> None:
    assert gpu_losses.pair_count(size, cache) == count
    assert count * size > 2 * cache


def test_samples_larger_than_the_cache_are_read_twice() -> None:
    tasks = gpu_losses.large_tasks()
    passes = {(task.form, len(task.shape)): gpu_losses.passes_of(task, 50 << 20) for task in tasks}
    assert passes == {
        ("gaussian", 4): 3, ("gaussian", 2): 5, ("variational", 4): 4, ("variational", 2): 4, ("density_ratio", 4): 2,
    }  # fmt: skip
    # What is promised comes first, long samples last but the form of which nothing is promised.
    assert [len(task.shape) for task in tasks] == [4] * 8 + [2] * 4 + [4]
    assert all(gpu_bounds.size_of(task._asdict()) == gpu_bounds.FULL for task in tasks[:4])


def test_latents_are_compiled_at_the_first_shapes() -> None:
    compiled = [task.shape for task in gpu_losses.latents_tasks() if gpu_losses.COMPILED in task.baselines]
    assert len(compiled) == 8 and set(compiled) == set(gpu_losses.LATENTS[:2])


def test_without_time_to_compile_the_other_rows_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_losses, "LEAST_COMPILED", 1e9)
    may_begin = gpu_losses.Bench.may_begin
    monkeypatch.setattr(
        gpu_losses.Bench, "may_begin", lambda self, name: name != gpu_losses.COMPILED and may_begin(self, name)
    )
    task = gpu_losses.latents_tasks(rehearsal=True)[0]
    gpu_losses.measure(plan_of(kept := []), [task], with_host=False)
    assert not kept[-1]["complete"] and kept[-1]["left_out"] == [["gaussian", "float32", gpu_losses.TOY, "compiled"]]
    assert {"clone", "eager", "cpu value_and_grad"} <= {row["candidate"] for row in kept[-1]["rows"]}


def test_a_row_that_may_take_too_long_is_not_begun() -> None:
    bench = gpu_losses.Bench(plan_of([], 20, rehearsal=False), with_host=False)
    assert bench.may_begin("clone") and bench.may_begin(gpu_losses.COMPILED)
    bench.longest = {True: 18.0, False: 2.0}
    assert bench.may_begin("clone") and not bench.may_begin(gpu_losses.COMPILED)


def test_training_stops_before_a_row_that_may_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(gpu_training, "measured", lambda model, row, plan: {"name": row.name})
    monkeypatch.setattr(gpu_training, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    plan = SimpleNamespace(left=iter([30.0, 13.0, 11.0]).__next__, keep=(kept := []).append)
    gpu_training.measure_rows("sd15", plan, gpu_training.rows())
    assert len(kept[-1]["rows"]) == 2 and kept[-1]["left_out"] == len(gpu_training.rows()) - 2


def test_any_error_of_a_training_row_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("not this one")

    monkeypatch.setattr(gpu_training, "measure", fail)
    found = gpu_training.measured("sd15", gpu_training.rows()[0], plan_of([]))
    assert found["error"] == "TypeError: not this one" and "step_s" not in found


def test_the_device_sleeps_while_the_host_prepares_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.elapsed_time = lambda end: 2.0

        def record(self) -> None:
            seen.append("event")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", seen.clear)
    turns = iter([(torch.tensor(number), torch.tensor(0)) for number in range(6)])
    taken = gpu_timing.device_us(lambda a, b: seen.append(str(a.item())), turns, 1, "cuda")
    assert taken == [2000.0] and next(turns)[0] == 5  # three to warm up, one for the host's time, one timed

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    seen.clear()
    gpu_timing.device_us(lambda a, b: seen.append("call"), itertools.repeat((torch.ones(1),) * 2), 2, "cuda")
    assert seen[4:] == ["sleep", "event", "call", "event"] * 2


def test_a_failed_capture_leaves_the_stream_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["default"]

    @contextlib.contextmanager
    def capture(graph: object) -> Iterator[None]:
        current[:] = ["capturing"]
        yield
        raise RuntimeError("capture failed")

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda back: current.__setitem__(0, back))
    with pytest.raises(RuntimeError, match="capture failed"):
        gpu_timing.graph_us(lambda a, b: None, (torch.ones(1),) * 2)
    assert current == [stream]


def test_after_a_failed_capture_none_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(run: Any, pair: Any) -> float:
        tried.append(1)
        raise RuntimeError("capture failed")

    for name in ("wall_us", "host_us"):
        monkeypatch.setattr(gpu_losses, name, lambda *_, **__: 1.0)
    monkeypatch.setattr(gpu_losses, "device_us", lambda *_: [1.0])
    monkeypatch.setattr(gpu_losses, "graph_us", fail)
    bench = gpu_losses.Bench(plan_of([], rehearsal=False), with_host=True)
    pair = (torch.ones(1), torch.ones(1))
    first, second = (bench._with_host(lambda a, b: (a,), pair, itertools.repeat(pair), 1) for _ in range(2))
    assert first["graph_error"] == "RuntimeError: capture failed" and "graph_us" not in first
    assert "graph_error" not in second and len(tried) == 1


def verdicts(record: dict[str, Any]) -> dict[str, str]:
    return {bound.what: bound.verdict for bound in gpu_bounds.bounds(record)}


def test_a_record_without_figures_waits() -> None:
    assert set(verdicts({}).values()) == {"waits"} and len(verdicts({})) == 13
    assert set(verdicts({"sanitizer": {"skipped": "its program is not installed"}}).values()) == {"waits"}


def test_a_record_that_keeps_all_promises_holds() -> None:
    assert set(verdicts(a_record()).values()) == {"holds"}
    by_name = {bound.what: bound for bound in gpu_bounds.bounds(a_record())}
    # Rate and memory are those of one run: the fastest of those that need little.
    assert by_name["step of Stable Diffusion 1.5: x the reference loop"].value == pytest.approx(3.1)
    assert by_name["step of Stable Diffusion 1.5: x the reference loop"].note == "fdu, sparing"


@pytest.mark.parametrize(
    "section, key, value, missed",
    [
        ("large", "share_of_copy", 0.89, 4),
        ("large", "extra_bytes", 2**29, 1),
        ("tests", "exit", 1, 1),
        ("sanitizer", "exit", None, 1),
    ],
)
def test_a_promise_that_is_not_kept_shows(section: str, key: str, value: Any, missed: int) -> None:
    record = a_record()
    for row in record[section].get("rows", [record[section]]):
        if key in row:
            row[key] = value
    assert list(verdicts(record).values()).count("fails") == missed


@pytest.mark.parametrize("section, figure, missed", [("latents", "wall_us", 2), ("large", "cold_us", 2)])
def test_the_slowest_shape_counts(section: str, figure: str, missed: int) -> None:
    record = a_record()
    slow = losses([64, 16, 128, 128], figure, {"eager": 12.0, "compiled": 12.0, "cuda value_and_grad": 10.0})
    record[section]["rows"] += slow
    assert list(verdicts(record).values()).count("fails") == missed
