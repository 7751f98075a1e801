"""The GPU suite, rehearsed on the CPU: every section at toy size, budgets that hold, promises that can fail."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_host
import competitors
import gpu_losses
import gpu_machine
import gpu_runner
import gpu_suite
import gpu_timing
import gpu_training
import promises
import pytest
import torch
from gpu_records import a_record, losses

SUITE = Path(gpu_suite.__file__)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups, memory from /proc")


def test_all_sections_fit_into_nine_minutes_and_make_what_is_judged() -> None:
    wanted = gpu_suite.sections(rehearsal=False)
    assert sum(section.seconds for section in wanted) <= 9 * 60 - gpu_runner.GRACE
    names = [section.name for section in wanted]
    assert len(set(names)) == len(names) and set(a_record()) <= set(names)
    rehearsed = {section.name for section in gpu_suite.sections(rehearsal=True)}
    assert set(names) - rehearsed == {"sanitizer", "compiled"}


def test_the_sanitizer_sees_every_way_through_the_kernels() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "--import-mode=importlib"]
    chosen = subprocess.run(
        [*command, "tests/gpu", "-k", gpu_suite.SANITIZED], cwd=gpu_runner.ROOT, capture_output=True, text=True
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
def test_a_rehearsal_runs_a_section_of_every_kind(tmp_path: Path) -> None:
    """The others are rehearsed below, without a process of their own; test_triton_codegen.py is that of "codegen"."""
    names = ["build", "machine", "tests", "latents", "sd15"]
    command = [sys.executable, str(SUITE), "--out", str(tmp_path), "--rehearsal", "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    record = json.loads((tmp_path / gpu_runner.RECORD).read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {gpu_runner.RECORD, gpu_runner.LOGS}
    assert {"logs/build.log", "logs/latents.json", "logs/tests.log"} <= set(archived(tmp_path))
    assert record["rehearsal"] and [name for name in record if name != "rehearsal"] == names
    machine = record["machine"]
    assert machine["torch"] == torch.__version__ and machine["backends"]["triton"] is None
    assert len(machine["commit"]) >= 7 and record["tests"]["exit"] == 0
    latents, steps = record["latents"], record["sd15"]
    assert_measured(latents, {"eager", "compiled", "triton autograd", "triton value_and_grad", "cpu value_and_grad"})
    assert all(row["wall_us"] > 0 for row in latents["rows"])
    assert_trained(steps)


def assert_measured(found: dict[str, Any], names: set[str]) -> None:
    """All rows of losses have figures, and every one of these competitors is there."""
    assert found["complete"] and not [row for row in found["rows"] if "error" in row]
    assert {"clone", *names} <= {row["candidate"] for row in found["rows"]}
    assert all(row["share_of_copy"] > 0 for row in found["rows"] if "value_and_grad" in row["candidate"])


def assert_trained(found: dict[str, Any]) -> None:
    """A step of each loop has its figures."""
    assert found["complete"] and [row["loop"] for row in found["rows"]] == ["reference", "fdu"]
    for row in found["rows"]:
        assert row["step_s"] > 0 and row["loss_us"] > 0 and isinstance(row["peak_mib"], float)


@pytest.mark.parametrize("section", [gpu_losses.large, gpu_losses.sweep])
def test_other_sizes_are_rehearsed(section: Any) -> None:
    section(plan_of(kept := []))
    assert_measured(
        kept[-1], {"cpu value_and_grad"} | ({"eager", "compiled"} if section == gpu_losses.large else set())
    )


def test_the_host_is_rehearsed() -> None:
    gpu_losses.host(plan_of(kept := []))
    assert [row["backend"] for row in kept[-1]["rows"]] == ["cpu"] and kept[-1]["rows"][0]["parts_us"]


def test_the_other_model_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDU_BACKEND", "cpu")
    gpu_training.train("sdxl", plan_of(kept := []))
    assert_trained(kept[-1])


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
    """Run a section that keeps a row and then does this, and return its result."""
    kept = "open(os.environ['FDU_PART'], 'w').write('{\"rows\": [1]}')"
    script = f"import os, signal, subprocess, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{kept}\n{body}"
    outcome = suite.run(command(script, seconds, measures=True))
    found = json.loads((suite.out / gpu_runner.RECORD).read_text())["imagined"]
    assert outcome == found.get("complete", True)
    return found


def test_a_section_that_hangs_is_killed_and_keeps_what_it_had(suite: gpu_runner.Suite) -> None:
    kept = run(suite, "subprocess.Popen(['sleep', '62.5']); time.sleep(60)", 3.0)
    assert kept["exit"] is None and not kept["complete"] and kept["rows"] == [1] and kept["seconds"] < 20
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


def test_a_section_that_ends_soon_after_its_budget_is_whole(
    suite: gpu_runner.Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_runner, "GRACE", 20.0)
    kept = run(suite, "time.sleep(3)", 1.5)
    assert kept["rows"] == [1] and "exit" not in kept


def test_a_section_that_dies_loses_no_other(suite: gpu_runner.Suite) -> None:
    kept = run(suite, "os._exit(6)", 5.0)
    assert kept["exit"] == 6 and not kept["complete"] and kept["rows"] == [1]


def command(script: str, seconds: float = 2.0, **more: Any) -> gpu_runner.Section:
    return gpu_runner.Section("imagined", seconds, (sys.executable, "-c", script), **more)


@pytest.mark.parametrize("where", ["foreground", "background"])
def test_a_command_that_hangs_may_say_what_it_has_and_ends_with_its_children(
    where: str, suite: gpu_runner.Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_runner, "GRACE", 10.0)
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
    assert not suite.run(command(script, 3.0))
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
    assert not suite.run(gpu_runner.Section("late", 10, ("false",)))
    assert suite.record["late"] == {"skipped": "no time left"}
    assert suite.run(gpu_runner.Section("spare", 0, ("false",), spare=150))


def test_an_interrupted_run_ends_its_sections_and_packs_its_logs(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(SUITE.parent)!r})
import gpu_suite
gpu_suite.sections = lambda rehearsal: [gpu_suite.Section("long", 60, ("sleep", "64.5"))]
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


def test_a_section_learns_from_its_environment_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plans: list[gpu_timing.Plan] = []
    sections = {"one": lambda plan: (plans.append(plan), plan.write({"rows": [1]}))}
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["script.py", "one"])
    for name, value in {"FDU_PART": str(tmp_path / "part.json"), "FDU_DEADLINE": "5.0"}.items():
        monkeypatch.setenv(name, value)
    gpu_timing.main(sections)
    # Without a GPU a run that is no rehearsal measures nothing on the CPU in its place.
    assert (plans[0].deadline, plans[0].device) == (5.0, "cuda")
    assert json.loads((tmp_path / "part.json").read_text()) == {"rows": [1]}
    monkeypatch.setenv("FDU_REHEARSAL", "1")
    gpu_timing.main(sections)
    assert plans[1].device == "cpu" and capsys.readouterr().out == ""
    for name in ("FDU_PART", "FDU_DEADLINE", "FDU_REHEARSAL"):
        monkeypatch.delenv(name)
    gpu_timing.main(sections)
    assert json.loads(capsys.readouterr().out) == {"rows": [1]} and plans[2].may_begin(50)
    monkeypatch.setattr(sys, "argv", ["script.py", "two"])
    with pytest.raises(SystemExit, match="one"):
        gpu_timing.main(sections)


def test_the_commit_may_come_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDU_COMMIT", "abc")
    monkeypatch.setattr(gpu_machine, "_output", lambda command: "")
    assert gpu_machine.source() == {"commit": "abc", "changed": None}
    monkeypatch.delenv("FDU_COMMIT")
    monkeypatch.setattr(gpu_machine, "_output", lambda command: "def" if "rev-parse" in command else " M file")
    assert gpu_machine.source() == {"commit": "def", "changed": True}


def test_unknown_sections_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SUITE), "--out", str(tmp_path), "--only", "lattents"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "lattents; there are build, machine" in done.stderr


def test_only_backends_that_take_tensors_of_the_device_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competitors.fk, "backends", lambda: dict.fromkeys(("cuda", "cpu", "torch")))
    assert competitors.fused_backends("cpu") == ["cpu"] and competitors.fused_backends() == ["cuda", "cpu"]
    monkeypatch.setattr(type(competitors.backend_named("cuda")), "_why_unusable", lambda self, index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert competitors.fused_backends("cuda") == ["cuda"]


def plan_of(kept: list[Any], seconds: float = 100, rehearsal: bool = True) -> gpu_timing.Plan:
    return gpu_timing.Plan(time.monotonic() + seconds, kept.append, rehearsal)


def test_a_backend_that_fails_loses_no_other_figures_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(shape: Any, name: str, *_: Any) -> dict[str, Any]:
        if name == "triton":
            raise RuntimeError("no such device")
        return {"backend": name}

    monkeypatch.setattr(bench_host, "measure", measure)
    monkeypatch.setattr(gpu_losses, "fused_backends", lambda device: ["triton", "cpu"])
    monkeypatch.setattr(bench_host, "SHAPES", [(1,)])
    gpu_losses.host(plan_of(kept := [], rehearsal=False))
    failed, fine = kept[-1]["rows"]
    assert failed["error"] == "RuntimeError: no such device" and "error" not in fine and kept[-1]["complete"]


@pytest.mark.parametrize("size, most, count", [(100, 64, 2), (2049, 64, 3), (1 << 20, 64, 64)])
def test_inputs_rotate_through_several_caches(size: int, most: int, count: int) -> None:
    pairs = competitors.rotating("gaussian", (4, 32), torch.float32, "cpu", size, most)  # 1024 bytes a pair
    assert len(pairs) == count and not torch.equal(pairs[0][0], pairs[1][0])


def test_samples_larger_than_the_cache_are_read_twice() -> None:
    tasks = gpu_losses.large_tasks()
    passes = {
        (form, len(shape)): competitors.FORMS[form].passes_for(shape, competitors.DTYPES[dtype], 50 << 20)
        for form, dtype, shape, _ in tasks
    }
    assert passes == {
        ("gaussian", 4): 3, ("gaussian", 2): 5, ("variational", 4): 4, ("variational", 2): 4, ("density_ratio", 4): 2,
    }  # fmt: skip
    # What is promised comes first, long samples last but the form of which nothing is promised.
    assert [len(task.shape) for task in tasks] == [4] * 8 + [2] * 4 + [4]
    assert all(promises.size_of(task._asdict()) == promises.FULL for task in tasks[:4])


def test_latents_are_compiled_at_the_first_shapes() -> None:
    compiled = [task.shape for task in gpu_losses.latents_tasks() if gpu_losses.COMPILED in task.baselines]
    assert len(compiled) == 8 and set(compiled) == set(gpu_losses.LATENTS[:2])


def test_without_time_to_compile_the_other_rows_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    may_begin = gpu_timing.Plan.may_begin
    monkeypatch.setattr(
        gpu_timing.Plan,
        "may_begin",
        lambda self, least, kind="": kind != competitors.COMPILED and may_begin(self, least),
    )
    task = gpu_losses.latents_tasks(rehearsal=True)[0]
    gpu_losses.measure(plan_of(kept := []), [task], with_host=False)
    assert not kept[-1]["complete"] and kept[-1]["left_out"] == [["gaussian", "float32", gpu_losses.TOY, "compiled"]]
    assert {"clone", "eager", "cpu value_and_grad"} <= {row["candidate"] for row in kept[-1]["rows"]}


def test_a_row_that_may_take_too_long_is_not_begun() -> None:
    rows = plan_of([], 20, rehearsal=False)
    assert rows.may_begin(3.0) and rows.may_begin(12.0, "compiled") and not rows.may_begin(21.0)
    rows.longest = {"compiled": 18.0, "": 2.0}
    assert rows.may_begin(3.0) and not rows.may_begin(12.0, "compiled")


def test_training_stops_before_a_row_that_may_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a row takes a second, and every look at the clock another
    monkeypatch.setattr(gpu_training, "figures_of", lambda model, row, plan: {})
    monkeypatch.setattr(gpu_training, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(gpu_timing, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    plan = gpu_timing.Plan(10.0, (kept := []).append, rehearsal=True)
    gpu_training.measure_rows("sd15", plan, gpu_training.rows())
    measured, left_out = len(kept[-1]["rows"]), len(kept[-1]["left_out"])
    assert measured == 3 and left_out == len(gpu_training.rows()) - 3 and not kept[-1]["complete"]


def test_what_was_out_of_memory_is_not_tried_with_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: str, row: gpu_training.Row, plan: gpu_timing.Plan) -> dict[str, Any]:
        if row.run.loop == "reference" and row.run.shared.train_batch_size >= 8:
            raise torch.OutOfMemoryError("no memory")
        return {}

    monkeypatch.setattr(gpu_training, "figures_of", full)
    monkeypatch.setattr(gpu_training, "gc", SimpleNamespace(collect=lambda: 0))
    gpu_training.measure_rows("sd15", plan_of(kept := []), gpu_training.rows())
    largest = {row["loop"]: row["batch"] for row in kept[-1]["rows"]}
    assert largest == {"reference": 8, "fdu": max(gpu_training.BATCHES)} and kept[-1]["complete"]


def test_the_full_shape_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setitem(gpu_training.MODELS, "sd15", lambda **options: made.append(options) or 1 / 0)
    plan = plan_of([], rehearsal=False)
    with pytest.raises(ZeroDivisionError):
        gpu_training.build("sd15", gpu_training.rows()[0], plan)
    assert made == [{"width": 1, "side": 1, "text_width": 1, "device": "cuda"}]


def test_any_error_of_a_row_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, Any]:
        raise TypeError("not this one")

    rows = plan_of(kept := [])
    rows.add({"name": "bad"}, fail)
    rows.add({"name": "good"}, lambda: {"step_s": 1.0})
    bad, good = kept[-1]["rows"]
    assert bad["error"] == "TypeError: not this one" and good["step_s"] == 1.0


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


def test_after_a_failed_capture_none_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(run: Any, pair: Any) -> float:
        tried.append(1)
        raise RuntimeError("capture failed")

    monkeypatch.setattr(gpu_losses, "graph_us", fail)
    bench = gpu_losses.Bench(plan_of([], rehearsal=False), with_host=True)
    pair = (torch.ones(1), torch.ones(1))
    first, second = (bench.graph(lambda a, b: (a,), pair) for _ in range(2))
    assert first == {"graph_error": "RuntimeError: capture failed"} and second == {} and len(tried) == 1


def verdicts(record: dict[str, Any]) -> dict[str, str]:
    return {bound.what: bound.verdict for bound in promises.gpu(record)}


def test_a_record_without_figures_waits() -> None:
    assert set(verdicts({}).values()) == {"waits"} and len(verdicts({})) == 13
    assert set(verdicts({"sanitizer": {"skipped": "its program is not installed"}}).values()) == {"waits"}


def test_a_record_that_keeps_all_promises_holds() -> None:
    assert set(verdicts(a_record()).values()) == {"holds"}
    by_name = {bound.what: bound for bound in promises.gpu(a_record())}
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
