"""The GPU suite, rehearsed on the CPU: sections at toy size, and time limits that hold."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_host
import competitors
import emulated_cuda
import gpu_losses
import gpu_suite
import gpu_training
import gpu_wheels
import pytest
import records
import shapes
import torch

from fdu_kernels import build
from fdu_kernels.kernels.triton import tuning

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="process groups, memory from /proc")


def rows_for(seconds: float = 100, rehearsal: bool = True) -> records.Rows:
    return records.Rows(lambda found: None, time.time() + seconds, rehearsal)


# Sections and their processes


def test_all_sections_fit_into_nine_minutes() -> None:
    wanted = gpu_suite.sections(rehearsal=False)
    assert sum(section.seconds for section in wanted) <= 9 * 60 - gpu_suite.GRACE
    names = [section.name for section in wanted]
    rehearsed = [section.name for section in gpu_suite.sections(rehearsal=True)]
    assert len(set(names)) == len(names) and set(names) - set(rehearsed) == set(gpu_suite.ON_A_GPU)


TESTS_OF_BARRIERS = ("clusters_and_tickets", "shared_memory")


def collected(section: gpu_suite.Section) -> list[str]:
    """The tests that a section would run."""
    chosen: list[str] = []
    plugin = SimpleNamespace(
        pytest_collection_finish=lambda session: chosen.extend(one.nodeid for one in session.items)
    )
    given = section.command[section.command.index("pytest") + 1 :]
    pytest.main([*given, "--collect-only", "-qq", "--rootdir", str(gpu_suite.ROOT)], plugins=[plugin])
    return chosen


def sections_with_tools(monkeypatch: pytest.MonkeyPatch) -> dict[str, gpu_suite.Section]:
    """All sections by name, as on a machine with compute-sanitizer."""
    monkeypatch.chdir(gpu_suite.ROOT)
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: name)
    monkeypatch.setattr(gpu_suite.importlib.util, "find_spec", lambda name: None)  # no xdist
    return {section.name: section for section in gpu_suite.sections(rehearsal=False)}


def test_the_sanitizers_see_every_way_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sections_with_tools(monkeypatch)
    chosen, raced = collected(found["memcheck"]), collected(found["racecheck"])
    wanted = (
        "golden_values",
        "golden_critics",
        "(7, 4, 33, 35)",
        "strides",
        "tickets[{}-262144",
        "tickets[{}-300001",
    )
    for name, backend in itertools.product(wanted, ("triton", "cuda")):
        ours = [node for node in chosen if name.format(backend) in node and backend in node]
        assert ours, f"no {name} of {backend} in {chosen}"
    assert len(chosen) <= 18
    clusters, shared = ([node for node in raced if f"test_{name}[cuda-" in node] for name in TESTS_OF_BARRIERS)
    assert len(clusters) == 4 and len(shared) == 2 and len(raced) == 6 and set(shared) <= set(chosen)


def test_each_backend_has_a_section_of_all_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    found = sections_with_tools(monkeypatch)
    by_section = {name: set(collected(found[name])) for name in ("cuda", "triton")}
    every = set(collected(gpu_suite.dataclasses.replace(found["cuda"], command=found["cuda"].command[:-2])))
    assert not by_section["cuda"] & by_section["triton"] and by_section["cuda"] | by_section["triton"] == every
    assert len(by_section["cuda"]) == len(by_section["triton"]) > 100
    # A fixture per module would bind all of them to one of the parallel processes (tests/conftest.py).
    assert 'scope="module"' not in (gpu_suite.ROOT / "tests" / "gpu" / "test_gpu.py").read_text()
    training = collected(found["fdu"])
    assert any("gradient_surgery" in node or "True-bf16" in node for node in training) and len(training) > 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rehearsal_writes_a_record_with_rows_and_the_logs(tmp_path: Path) -> None:
    command = [sys.executable, gpu_suite.__file__, "--out", str(tmp_path), "--rehearsal"]
    names = ["machine", "latents"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([*command, "--only", *names], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / gpu_suite.RECORD).read_text())
    assert record["rehearsal"] and [name for name in record if name != "rehearsal"] == names
    assert set(kept_logs(tmp_path)) == {f"{name}.log" for name in names} and record["machine"]["complete"]
    latents = record["latents"]
    assert_measured(latents["rows"], {"eager", "compiled", "triton autograd", "triton value_and_grad"})
    assert all(row["wall_us"] > 0 for row in latents["rows"])


def kept_logs(folder: Path) -> list[str]:
    """The names of the logs, and nothing but them and the record is in the folder."""
    assert {path.name for path in folder.iterdir()} == {gpu_suite.RECORD, gpu_suite.LOGS}
    with tarfile.open(folder / gpu_suite.LOGS) as archive:
        return [Path(one.name).name for one in archive.getmembers() if one.isfile()]


def test_a_machine_with_torch_and_pytest_alone_runs_the_sections_of_the_losses() -> None:
    code = """if True:
        import contextlib, runpy, sys
        sys.modules.update(dict.fromkeys(("diffusers", "transformers", "accelerate", "peft", "pytest_benchmark")))
        sys.argv = ["gpu_suite.py", "--help"]
        with contextlib.suppress(SystemExit):
            runpy.run_path("benchmarks/gpu_suite.py", run_name="__main__")
        sys.argv = ["gpu_losses.py", "machine", "--rehearsal"]
        runpy.run_path("benchmarks/gpu_losses.py", run_name="__main__")
    """
    paths = os.pathsep.join(map(str, (gpu_suite.ROOT, gpu_suite.HERE)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=gpu_suite.ROOT)
    assert done.returncode == 0, done.stderr
    assert "--rehearsal" in done.stdout and '"device": "CPU' in done.stdout


def test_unknown_sections_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", "none", "--only", "lattents"])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert "lattents; there are build, wheels" in capsys.readouterr().err


def section(script: str, **more: Any) -> gpu_suite.Section:
    """A section that writes a row and then runs a script."""
    row = """import os, signal, subprocess, sys, time
if '--rows' in sys.argv: open(sys.argv[2], 'w').write('{"rows": [1]}')"""
    return gpu_suite.Section("imagined", 2.0, (sys.executable, "-c", f"{row}\n{script}"), **more)


def running(argument: bytes) -> bool:
    """Whether a process has this argument; a killed one stays in the table until somebody has collected it."""
    end, found = time.monotonic() + 20, True
    while found and time.monotonic() < end:
        found = False
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found |= argument in path.read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
    return found


@pytest.mark.parametrize("ignores, code", [(False, 1), (True, -9)])
def test_a_section_that_hangs_ends_with_its_children_and_keeps_its_rows(
    ignores: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first says what it has when it is interrupted; the second must be killed."""
    monkeypatch.setattr(gpu_suite, "GRACE", 0.5 if ignores else 20.0)
    ignore = (
        "signal.signal(signal.SIGINT, signal.SIG_IGN)" if ignores else "signal.signal(2, signal.default_int_handler)"
    )
    script = f"""
{ignore}
try:
    subprocess.Popen(["sleep", "61.75"], preexec_fn=lambda: os.setpgid(0, 0))  # as ninja does
    subprocess.run(["sleep", "61.5"])
except KeyboardInterrupt:
    sys.exit("3 passed")
"""
    imagined = section(script, measures=True)
    found = gpu_suite.run(imagined, tmp_path / "rows.json", tmp_path / "log", 2.0)
    assert found["exit"] == code and found["seconds"] < 30
    assert records.read(tmp_path / "rows.json")["rows"] == [1]
    assert found["tail"] == ([] if ignores else ["3 passed"])
    assert not gpu_suite.succeeded(imagined, found) and not running(b"61.5") and not running(b"61.75")


def suite_of(*wanted: gpu_suite.Section, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """The exit code and the record of a rehearsal of these sections."""
    monkeypatch.setattr(gpu_suite, "sections", lambda *_: list(wanted))
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(out), "--rehearsal"])
    handlers = {number: signal.getsignal(number) for number in gpu_suite.SIGNALS}
    try:
        code = gpu_suite.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, json.loads((out / gpu_suite.RECORD).read_text())


def test_an_interrupted_suite_ends_its_section_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt = f"import os; os.kill({os.getpid()}, signal.SIGTERM); subprocess.run(['sleep', '62.5'])"
    first, last = (gpu_suite.Section(name, 2.0, ("true",)) for name in ("first", "last"))
    wanted = (first, section(interrupt, measures=True), last)
    code, record = suite_of(*wanted, out=tmp_path, monkeypatch=monkeypatch)
    assert code == 130 and record["interrupted"] and not running(b"62.5")
    assert record["first"]["exit"] == 0 and record["imagined"]["rows"] == [1] and "last" not in record
    assert kept_logs(tmp_path) == ["first.log", "imagined.log"]
    assert "incomplete: imagined, last" in capsys.readouterr().out


def test_without_time_or_program_a_section_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = (
        gpu_suite.Section("missing", 1, ()),
        section("print('done')"),
        gpu_suite.dataclasses.replace(section("sys.exit(3)", measures=True), name="failed"),
        gpu_suite.Section("without_rows", 1, ("true",), measures=True),
        gpu_suite.Section("late", 1, ("false",), least=1e4),
        gpu_suite.Section("if_time_is_left", 0, ("false",), least=1e4),
    )
    code, record = suite_of(*wanted, out=Path("relative"), monkeypatch=monkeypatch)
    assert code == 1 and "incomplete: failed, without_rows, late;" in capsys.readouterr().out
    assert "not installed" in record["missing"]["skipped"] and "no time" in record["late"]["skipped"]
    assert record["imagined"]["exit"] == 0 and record["imagined"]["tail"] == ["done"]
    assert record["failed"]["exit"] == 3 and record["failed"]["rows"] == [1]


@pytest.mark.parametrize(
    "told, good",
    [
        (["cuda: for 9.0 by nvcc 13.0", "architectures: 9.0"], True),
        (["cuda: the build with nvcc failed", "architectures: "], False),
    ],
)
def test_a_build_needs_cuda_kernels(told: list[str], good: bool) -> None:
    build = gpu_suite.Section("build", 1.0, ("true",))
    assert gpu_suite.succeeded(build, {"exit": 0, "tail": told}) == good


def test_the_logs_of_builds_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, logs, out = tmp_path / "fdu_kernels" / "0123" / "build", tmp_path / "logs", tmp_path / "out"
    for folder in (made, logs, out):
        folder.mkdir(parents=True)
    (made / "build.log").write_text("nvcc says")
    (made.parent / "failure.txt").write_text("it failed")
    gpu_suite.write_json(out / gpu_suite.RECORD, {})
    gpu_suite.pack(logs, out / gpu_suite.LOGS, builds=True)
    assert set(kept_logs(out)) == {"build-0123-build.log", "build-0123-failure.txt"}
    assert (logs / "build-0123-build.log").read_text() == "nvcc says"

    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(gpu_suite.shutil, "copyfile", fail)
    gpu_suite.pack(logs, out / gpu_suite.LOGS, builds=True)
    assert "no space" in capsys.readouterr().out


def test_wheels_are_unpacked_for_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [line for line in gpu_wheels.NAMED.read_text().splitlines() if not line.startswith("#")]
    assert [f"{name}=={version}" for name, version in gpu_wheels.named().items()] == names and names
    monkeypatch.setattr(gpu_wheels, "NAMED", tmp_path / "named.txt")
    gpu_wheels.NAMED.write_text("# a comment\nnumpy==0.1\nabsent_one==1.0\nabsent_two==2.0\n")
    for wheel in ("absent_one-1.0-py3-none-any.whl", "absent_two-2.0-cp27-cp27m-any.whl"):
        with zipfile.ZipFile(tmp_path / wheel, "w") as archive:
            archive.writestr(f"{wheel.partition('-')[0]}/__init__.py", "")
    site = tmp_path / "site"
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", "--into", str(site), "--wheels", str(tmp_path)])
    assert gpu_wheels.main() == 1
    assert [path.name for path in site.iterdir()] == ["absent_one"]
    told = capsys.readouterr().out
    assert "numpy: installed" in told and "missing: absent_two==2.0;" in told


# Rows


def test_a_row_that_fails_or_may_take_too_long_costs_no_other() -> None:
    rows = rows_for(20, rehearsal=False)
    rows.add({"name": "bad"}, lambda: 1 / 0)
    rows.longest = {"": 2.0, "compiled": 18.0}
    rows.add({"name": "good"}, lambda: {"step_s": 1.0})
    rows.add({"name": "long"}, lambda: {}, least=21.0)
    rows.add({"name": "as long as the last"}, lambda: {}, least=12.0, kind="compiled")
    bad, good = rows.rows
    assert bad["error"].startswith("ZeroDivisionError") and good["step_s"] == 1.0
    assert [row["name"] for row in rows.left_out] == ["long", "as long as the last"]


def test_a_section_writes_its_rows_and_whether_they_are_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    seen: list[Any] = []

    def one(rows: records.Rows) -> None:
        rows.add({"number": 1}, lambda: {})
        seen.append((rows.device, records.read(tmp_path / "rows.json")["complete"]))
        rows.add({"number": 2}, lambda: {}, least=1e9)

    for rehearsal in ([], ["--rehearsal"]):
        argv = ["script.py", "one", "--rows", str(tmp_path / "rows.json"), "--until", str(time.time() + 50), *rehearsal]
        monkeypatch.setattr(sys, "argv", argv)
        records.run_section({"one": one})
        found = records.read(tmp_path / "rows.json")
        assert found["complete"] == bool(rehearsal) and found["rows"][0] == {"number": 1}
    # Without a GPU a run that is no rehearsal measures nothing on the CPU in its place.
    assert seen == [("cuda", False), ("cpu", False)]


def test_an_interrupted_section_finishes_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(rows: records.Rows) -> None:
        rows.add({"number": 1}, lambda: os.kill(os.getpid(), signal.SIGINT) or {"step_s": 1.0})

    argv = ["script.py", "one", "--rows", str(tmp_path / "rows.json"), "--until", str(time.time() + 50)]
    monkeypatch.setattr(sys, "argv", argv)
    handler = signal.getsignal(signal.SIGINT)
    try:
        records.run_section({"one": one})
    finally:
        signal.signal(signal.SIGINT, handler)
    found = records.read(tmp_path / "rows.json")
    assert found["complete"] and found["rows"] == [{"number": 1, "step_s": 1.0}]


# What the sections measure


def assert_measured(rows: list[dict[str, Any]], names: set[str]) -> None:
    """All rows of losses have figures, and every one of these competitors is there."""
    assert not [row for row in rows if "error" in row]
    assert {"clone", "cpu value_and_grad", *names} <= {row["candidate"] for row in rows}
    assert all(row["share_of_copy"] > 0 for row in rows if "value_and_grad" in row["candidate"])


@pytest.mark.parametrize("name, wanted", [("large", {"eager", "compiled", "cpu tabulated"}), ("sweep", set())])
def test_other_sizes_are_rehearsed(name: str, wanted: set[str]) -> None:
    rows = rows_for()
    gpu_losses.SECTIONS[name](rows)
    assert_measured(rows.rows, wanted)


def test_the_machine_is_described_even_if_little_time_is_left() -> None:
    gpu_losses.machine(rows := rows_for(0.5, rehearsal=False))
    (found,) = rows.rows
    assert found["versions"]["torch"] == torch.__version__ and found["backends"]["cpu"] is None and found["date"]


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = SimpleNamespace(L2_cache_size=50 << 20, total_memory=80 << 30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: sizes)
    printed = {"nvidia-smi": "580.65", "nvcc": "", "/usr/local/cuda/bin/nvcc": "nvcc:\nBuild cuda_13.0"}
    monkeypatch.setattr(records, "output_of", lambda name, *_: printed.get(name, ""))
    found = records.machine()
    assert found["device"].startswith("A GPU; CPU") and found["multiprocessors"] == 132
    assert found["driver"] == "580.65" and found["nvcc"] == "Build cuda_13.0"
    assert (found["l2_bytes"], found["memory_bytes"]) == (50 << 20, 80 << 30)


def test_without_time_no_inputs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competitors, "rotating", None)
    gpu_losses.SECTIONS["large"](rows := rows_for(-1))
    assert not rows.rows and [row["form"] for row in rows.left_out] == ["gaussian", "variational"]


def test_after_a_failed_capture_none_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: list[Any] = [0.25, RuntimeError("capture failed")]

    def capture(call: Any, return_mode: str) -> float:
        call()
        if isinstance(outcome := outcomes.pop(0), Exception):
            raise outcome
        return outcome

    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench_cudagraph=capture))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_losses, "device_us", lambda *_: [1.0, 2.0])
    for name in ("wall_us", "host_us"):
        monkeypatch.setattr(gpu_losses, name, lambda *_, **__: 1.0)
    monkeypatch.setattr(gpu_losses.bench_memory, "measure", lambda *_: {"extra_bytes": 0})
    pair, rows = competitors.inputs((2, 4), torch.float32, "cpu"), rows_for(rehearsal=False)
    run = competitors.candidate("gaussian", "eager")
    for _ in range(3):
        row = {"form": "gaussian", "candidate": "eager"}
        rows.add(row, functools.partial(gpu_losses.figures_of, row, {}, run, [pair], iter(()), rows, True))
    first, failed, last = rows.rows
    assert first["graph_us"] == 250.0 and failed["graph_error"] == "RuntimeError: capture failed"
    assert last["host_us"] == 1.0 and not {"graph_us", "graph_error", "error"} & set(last)


def test_a_backend_that_fails_loses_no_other_figures_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_losses, "fused_backends", lambda device: ["broken", "cpu"])
    gpu_losses.host(rows := rows_for())
    failed, fine = rows.rows
    assert "error" in failed and set(fine["parts_us"]) == set(bench_host.PARTS)


@pytest.mark.slow
def test_the_larger_model_is_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDU_BACKEND", "cpu")
    gpu_training.train("sdxl", rows := rows_for())
    assert [row["name"] for row in rows.rows] == ["reference", "fdu, frozen outputs kept"]
    for row in rows.rows:
        assert row["step_s"] > 0 and row["loss_us"] > 0 and isinstance(row["peak_mib"], float)


def test_the_full_shape_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setitem(gpu_training.MODELS, "sd15", lambda *options: made.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu_training.build("sd15", gpu_training.variants()[0], rows_for(rehearsal=False))
    assert made == [(shapes.FULL, "cuda")]


def test_what_was_out_of_memory_is_not_tried_with_larger_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: str, one: gpu_training.Variant, rows: records.Rows) -> dict[str, Any]:
        if one.run.loop == "reference" and one.run.shared.train_batch_size >= 8:
            raise torch.OutOfMemoryError("no memory")
        return {}

    monkeypatch.setattr(gpu_training, "figures_of", full)
    monkeypatch.setattr(gpu_training, "gc", SimpleNamespace(collect=lambda: 0))
    gpu_training.measure_variants("sd15", gpu_training.variants(), rows := rows_for())
    largest = {row["name"].split()[0].strip(","): row["batch"] for row in rows.rows}
    assert largest == {"reference": 8, "fdu": max(gpu_training.BATCHES)}


def test_only_backends_that_take_tensors_of_the_device_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competitors.fk, "backends", lambda: dict.fromkeys(("cuda", "cpu", "torch")))
    assert competitors.fused_backends("cpu") == ["cpu"] and competitors.fused_backends() == ["cuda", "cpu"]
    monkeypatch.setattr(type(competitors.backend_named("cuda")), "_why_unusable", lambda self, index: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert competitors.fused_backends("cuda") == ["cuda"]


@pytest.mark.parametrize("size, most, count", [(100, 64, 2), (2049, 64, 3), (1 << 20, 64, 64)])
def test_inputs_rotate_through_several_caches(size: int, most: int, count: int) -> None:
    pairs = competitors.rotating("gaussian", (4, 32), torch.float32, "cpu", size, most)  # 1024 bytes a pair
    assert len(pairs) == count and not torch.equal(pairs[0][0], pairs[1][0])


def test_tasks_come_in_the_order_of_what_is_promised() -> None:
    tasks = gpu_losses.large_tasks()
    sizes = [math.prod(task.shape[1:]) for task in tasks]
    assert sizes[:12] == [2**18] * 8 + [2**16] * 2 + [2**20] * 2 and min(sizes[12:16]) > 2**24 and len(tasks) == 17
    assert [task.form for task in tasks[8:12]] == ["gaussian"] * 4 and not any(task.baselines for task in tasks[8:12])
    full = [math.prod(task.shape) * competitors.DTYPES[task.dtype].itemsize for task in tasks]
    assert set(full[:4] + full[8:]) == {gpu_losses.FULL} and set(full[4:8]) == {gpu_losses.LEAST_LARGE}
    compiled = [task.shape for task in gpu_losses.latents_tasks() if competitors.COMPILED in task.baselines]
    assert len(compiled) == 8 and set(compiled) == set(gpu_losses.LATENTS[:2])


@pytest.mark.parametrize("clusters", [False, True])
def test_passes_are_those_that_the_plans_make(clusters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a plan holds no sample on chip, it is read twice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0) if clusters else (8, 0))
    try:
        on_chip = emulated_cuda.load().on_chip
    except build.BuildError as error:
        pytest.skip(str(error))
    for size in (4096, 16384, 32768, 32772, 65536, 262144, 262148, 2**20, 2**20 + 4):
        task = gpu_losses.Task("gaussian", "float32", (7, size))
        cuda = on_chip(size, 7, False, 4, 132, clusters)[0] > 0
        triton = tuning.on_chip(size, "linear", True, False) is not None
        for name, held in (("cuda value_and_grad", cuda), ("triton value_and_grad", triton)):
            assert gpu_losses.passes_of(name, task) == (3 if held else 5), (name, size)
    assert gpu_losses.passes_of("clone", task) == 2
    for form, passes in (("variational", 4), ("density_ratio", 2)):
        assert gpu_losses.passes_of("cuda value_and_grad", task._replace(form=form)) == passes


def test_the_device_sleeps_while_the_host_prepares_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.elapsed_time = lambda end: 2.0

        def record(self) -> None:
            seen.append("event")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    turns = iter([(torch.tensor(number), torch.tensor(0)) for number in range(7)])
    taken = gpu_losses.device_us(lambda a, b: seen.append(str(a.item())), turns, 2, "cuda")
    # Three to warm up, one for the host's time, two timed on the next inputs.
    assert taken == [2000.0] * 2 and next(turns)[0] == 6
    assert seen == ["0", "1", "2", "3", "sleep", "event", "4", "event", "sleep", "event", "5", "event"]
