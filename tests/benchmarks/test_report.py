"""Records, the promises about them, and docs/performance.md, which report.py writes from the records alone."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import promises
import pytest
import records
import report

ROOT = Path(report.__file__).parents[1]
MACHINE = {
    "device": "CPU (a CPU)", "versions": {"python": "3", "torch": "2"}, "commit": "0123456789abcdef", "changed": True,
    "date": "2026-01-02",
}  # fmt: skip
FULL, LATENT = [512, 16, 128, 128], [1, 4, 64, 64]
PARTS = {"checks": 4.0, "choice and dispatch": 1.0, "allocation and arguments": 2.0, "launch": 3.0}
HOST = {"form": "host", "shape": LATENT, "backend": "cpu", "medians_us": {"call": 10.0}, "parts_us": PARTS}


def sweep(form: str, shape: list[int], seconds: float) -> dict[str, Any]:
    names = ("clone", "eager", "compiled", "cpu", "torch")
    medians = {name: seconds * (1 + number) for number, name in enumerate(names)}
    return {
        "form": form, "shape": shape, "bytes": 4 * math.prod(shape), "pairs": 2, "medians": medians,
        "quartiles": {name: [taken * 0.9, taken * 1.1] for name, taken in medians.items()},
        "share": {name: 1.5 * seconds / taken for name, taken in medians.items() if name != "clone"},
    }  # fmt: skip


def a_record() -> dict[str, Any]:
    """A record of a CPU that keeps every promise."""
    medians = {"eager": 8e-4, "compiled": 4e-4, "autograd": 2e-4, "value_and_grad": 1e-4}
    clone = {"clone": 1e-4, "value_and_grad": 2e-4}
    one = {"input_bytes": 100, "gradient_bytes": 100}
    memory = {"eager": {**one, "extra_bytes": 400}, "cpu value_and_grad": {**one, "extra_bytes": 4}}
    reference = {"wall_training": 20.0, "wall_sampling": 80.0, "peak": 100.0, "highest": 100.0, "cores_step": 1.0}
    ours = {"wall_training": 8.0, "wall_sampling": 10.0, "peak": 50.0, "highest": 50.0, "cores_step": 1.0}
    names = ("fdu", promises.KEPT, promises.JOB)
    runs = {name: [{**ours, "wall_step": 1.0}] for name in names}
    runs.update({name: [{**reference, "wall_step": 1.7}] for name in ("reference", promises.REFERENCE_JOB)})
    rows = {
        "losses": [
            {"form": "gaussian", "dtype": "float32", "shape": [2, 4, 64, 64], "medians": medians},
            {"form": "bandwidth", "dtype": "float32", "shape": [2, 4], "pairs": 2, "share": 0.9, "medians": clone},
        ],
        "host": [HOST],
        "memory": [{"form": "gaussian", "dtype": "float32", "shape": [2, 50], "memory": memory}],
        "scaling": [
            sweep("batch", LATENT, 1e-5),
            sweep("batch", [4, 4, 64, 64], 4e-5),
            sweep("elements", [4, 256], 1e-5),
            {"form": "concepts", "concepts": 2, "batch": 16, "step": 0.5},
        ],
    }
    proportions = {"denoiser, GFLOP": 2.0, "encoder, GFLOP": 1.0, "denoiser, M parameters": 3.0}
    training = {
        "rounds": 1, "job_share": 50, "latents": 96, "job_latents": 2, "runs": runs,
        "proportions": {"1": proportions, "scaled": proportions},
    }  # fmt: skip
    return {
        **{suite: {**MACHINE, "rows": found} for suite, found in rows.items()},
        "training": {**MACHINE, **training},
        "evaluation": {**MACHINE, "classes": 10, "images_per_class": 2, "seconds": {"drawing": 60.0}},
        "closed_form": {**MACHINE, "threads": 2, "concepts": 100, "seconds": {"emoji, fox to wolf": 0.5}},
    }


def gpu_losses(shape: list[int], figure: str, times: dict[str, float]) -> list[dict[str, Any]]:
    """Rows of every kind that is promised."""
    rows = []
    for form in ("gaussian", "variational"):
        for dtype, width in (("float32", 1), ("bfloat16", 2)):
            for candidate, taken in times.items():
                row = {"shape": [shape[0] * width, *shape[1:]], "dtype": dtype, "form": form, "candidate": candidate}
                row.update({"cold_us": taken, figure: taken, "extra_bytes": 0})
                if "value_and_grad" in candidate:
                    row["share_of_copy"] = 0.95 if candidate.startswith("cuda") else 0.5
                rows.append(row)
    return rows


def a_gpu_record() -> dict[str, Any]:
    """A record of gpu_suite.py that keeps every promise."""
    ours = {"cuda value_and_grad": 10.0, "triton value_and_grad": 20.0}
    step = {"model": "sd15", "batch": 2, "precision": "bf16", "loss_us": 1.0}
    return {
        "machine": {"rows": [{**MACHINE, "device": "A GPU"}]},
        "large": {"rows": gpu_losses(FULL, "cold_us", {"clone": 8.0, "eager": 31.0, "compiled": 14.0, **ours})},
        "latents": {"rows": gpu_losses(LATENT, "wall_us", {"clone": 8.0, "eager": 51.0, "compiled": 21.0, **ours})},
        "host": {"rows": [{**HOST, "backend": "cuda"}, {"shape": LATENT, "backend": "triton", "error": "no"}]},
        "sd15": {
            "rows": [
                {**step, "name": "reference", "step_s": 3.1, "peak_mib": 100.0},
                {**step, "name": "fdu", "step_s": 0.5, "peak_mib": 90.0},
                {**step, "name": "fdu, sparing", "step_s": 1.0, "peak_mib": 55.0},
            ]
        },
        "probe": {"rows": [{"variant": "copy", "copy_us": 1.0}, VARIANT]},
        **{name: {"exit": 0, "tail": ["9 passed"]} for name in ("cuda", "triton", "fdu")},
        **{name: {"exit": 0, "tail": ["ERROR SUMMARY: 0 errors"]} for name in ("memcheck", "racecheck")},
    }


VARIANT = {
    "size": 16384, "dtype": "float32", "elements": 32, "threads": 512, "cluster": 1, "arrival": "late", "us": 9.0,
    "share": 0.75,
}  # fmt: skip
LOOP = {
    "backend": "cuda", "loop": "variational, kl", "gpu": "sm_90", "dtype": "float32", "instructions": 20.0,
    "special": 1.0, "registers": 64, "spilled": 0, "threads": 1024, "in_flight": 32768,
}  # fmt: skip


def verdicts(record: dict[str, Any]) -> list[str]:
    return [bound.verdict for bound in promises.bounds_of(record)]


# The page


def test_every_record_is_shown(tmp_path: Path) -> None:
    compiled = {"compilers": "nvcc 13 and triton 3", "rows": [LOOP, {**LOOP, "gpu": "gfx942"}]}
    record = {**a_record(), "compiled": compiled}
    text = report.performance(record, {"gpu-h100.json": a_gpu_record()}, tmp_path)
    figures = {path.name for path in tmp_path.iterdir()}
    assert figures == {
        "losses.svg", "speed-of-light.svg", "host.svg", "gpu-h100-speed-of-light.svg", "gpu-h100-host.svg",
    }  # fmt: skip
    assert all(f"(performance/{name})" in text for name in figures)
    for said in (
        "commit 0123456789 and changes", "### A GPU", "| 2 | 16 | 500 |", "torch.clone | >= 0.8 | 0.9 | holds",
        "| gaussian float32 | 2x50 | 4.000 | 0.040 |", "| 100.0 (8.00, 4.00)", "<= 120 | 60 | holds",
        "| 16384 | float32 | 32 | 512 | 1 | late | 9.0 | 0.75 |",
        "| cuda | variational, kl | float32 | sm_90 | 20.0 | 1.0 | 64 | 0 | 1024 | 32 | H100 0.23, H200 0.33 |",
    ):  # fmt: skip
        assert said in text, said
    assert "fails" not in text and "No record yet" not in text and "waits" not in text


def test_a_gpu_is_named_with_its_driver_and_its_record_shown_without_it(tmp_path: Path) -> None:
    record = a_gpu_record()
    record["machine"]["rows"][0].update(driver="580.65", l2_bytes=50 << 20)
    text = report.performance({}, {"gpu.json": record}, tmp_path)
    assert "A GPU; driver 580.65, L2 cache of 50 MiB; python 3" in text
    only = {name: record[name] for name in ("latents", "cuda")}
    text = report.performance({}, {"gpu-h100.json": only}, tmp_path)
    assert "### gpu-h100" in text and "| 51.0 |" in text and "None" not in text
    assert {"holds", "waits"} == set(verdicts(only))


def test_the_same_figures_give_the_same_file(tmp_path: Path) -> None:
    for name in ("first.svg", "second.svg"):
        report.draw_host([HOST], tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_a_broken_promise_stands_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_save", lambda *_, **__: None)
    record = a_gpu_record()
    record["cuda"]["exit"] = 1
    assert report.performance({}, {"gpu.json": record}, tmp_path).count("**fails**") == 1


def test_without_records_the_page_says_how_to_make_them(tmp_path: Path) -> None:
    text = report.performance({}, {}, tmp_path / "figures")
    for suite in ("losses", "host", "memory", "scaling", "training", "evaluation", "closed_form"):
        assert f"`make bench SUITES={suite}` makes it" in text
    assert all(bound.what in text for bound in promises.gpu({})) and not (tmp_path / "figures").exists()


def test_the_page_in_docs_is_that_of_the_committed_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "--docs", str(tmp_path)])
    report.main()
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs" / "performance.md").read_text()
    drawn = {path.name for path in (tmp_path / "performance").iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "performance").iterdir()}


# Promises and records


def test_promises_wait_without_figures_and_hold_for_good_ones() -> None:
    assert {bound.verdict for bound in promises.gpu({})} == {"waits"}
    assert {bound.verdict for bound in promises.gpu({"memcheck": {"skipped": "not installed"}})} == {"waits"}
    assert set(verdicts(a_record())) == set(verdicts(a_gpu_record())) == {"holds"}
    rate = next(bound for bound in promises.gpu(a_gpu_record()) if "step of" in bound.what)
    # Rate and memory are those of one run: the fastest of those that need little.
    assert rate.value == pytest.approx(3.1) and rate.note == "fdu, sparing"


@pytest.mark.parametrize(
    "section, key, value, missed",
    [
        ("large", "share_of_copy", 0.89, 4),
        ("large", "extra_bytes", 2**29, 1),
        *[(section, "exit", code, 1) for section, code in zip(promises.CHECKED, (1, 1, 1, -9, 9), strict=True)],
    ],
)
def test_a_broken_promise_of_a_gpu_shows(section: str, key: str, value: Any, missed: int) -> None:
    record = a_gpu_record()
    for row in record[section].get("rows", [record[section]]):
        if key in row:
            row[key] = value
    assert verdicts(record).count("fails") == missed


@pytest.mark.parametrize("section, figure", [("latents", "wall_us"), ("large", "cold_us")])
def test_the_slowest_shape_counts(section: str, figure: str) -> None:
    record = a_gpu_record()
    slow = {"eager": 12.0, "compiled": 12.0, "cuda value_and_grad": 10.0}
    record[section]["rows"] += gpu_losses([64, 16, 128, 128], figure, slow)
    assert verdicts(record).count("fails") == 2


def test_the_preferred_backend_must_be_the_faster_one() -> None:
    record = a_gpu_record()
    for row in record["latents"]["rows"]:
        if row["candidate"] == "triton value_and_grad" and row["form"] == "variational":
            row["wall_us"] = 9.5
    (late,) = [bound for bound in promises.gpu(record) if "over triton" in bound.what]
    assert late.verdict == "fails" and late.value == pytest.approx(0.95) and "variational" in late.note


@pytest.mark.parametrize("figure, value", [("wall_step", 1.1), ("peak", 61.0), ("wall_sampling", 18.0)])
def test_a_broken_promise_of_training_shows(figure: str, value: float) -> None:
    record = a_record()
    for name in (promises.KEPT, promises.JOB):
        record["training"]["runs"][name][0][figure] = value
    assert verdicts(record).count("fails") == 1


def test_promises_are_judged_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "cpu.json", tmp_path / "gpu.json"]
    monkeypatch.setattr(sys, "argv", ["promises.py", *map(str, paths)])
    record = a_record()
    paths[0].write_text(json.dumps(record))
    paths[1].write_text(json.dumps(a_gpu_record()))
    assert promises.main() == 0
    del record["losses"]["rows"][0]["medians"]["autograd"]  # it counts as infinitely slow
    paths[0].write_text(json.dumps(record))
    assert promises.main() == 1


def test_a_part_is_written_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results" / "cpu.json"
    monkeypatch.setenv("FDU_COMMIT", "abc")
    for suite in ("losses", "host", "losses"):
        records.keep(path, suite, rows=[suite])
    found = records.read(path)
    assert list(found) == ["losses", "host"] and found["host"]["rows"] == ["host"]
    assert found["host"]["commit"] == "abc" and "CPU" in found["host"]["device"] and found["host"]["versions"]["torch"]
