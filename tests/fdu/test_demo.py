"""The demonstration from end to end, small: what it writes, that it can be repeated, and what it will not replace."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import fdu
from fdu import cli
from fdu.cli import main
from fdu.evaluation import JUDGED_SEED
from fdu.subjects.digits import pipeline as digits

QUICK = [
    "--max_train_steps=2",
    "--train_batch_size=2",
    "--num_latents=4",
    "--num_inference_steps=2",
    "--images_per_class=1",
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def few_inference_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default an image takes 20 steps. These tests do not ask whether the images are good."""
    real = fdu.draw
    monkeypatch.setattr(fdu, "draw", lambda *given, **named: real(*given, **named | {"num_inference_steps": 2}))


def test_twice_in_a_row(
    capsys: pytest.CaptureFixture[str], pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["demo", "digits", *QUICK]) == cli.OK
    output = capsys.readouterr().out
    for words in ("before", "in unseen phrasings", "retained (9 classes)", "worst:", "another kind (4 classes)"):
        assert words in output
    folder = Path("demo-out")
    assert {path.name for path in folder.iterdir()} == {
        "metrics.json",
        "images",
        "report.html",
        "before-after.png",
        "erased",
    }

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["command"] == "fdu demo digits " + " ".join(QUICK)
    assert (metrics["target"], metrics["anchor"], metrics["images_per_class"]) == ("three", "eight", 1)
    assert (metrics["divergence"], metrics["steps"], metrics["seed"]) == ("squared_hellinger", 2, 0)
    assert metrics["settings"]["preservation_prompts"] == list(digits.preserved("three"))
    assert metrics["sigma"] > 0 and metrics["seconds"] > 0
    assert metrics["device"].startswith("cpu") and "torch" in metrics["versions"]
    assert len(metrics["before"]["per_class"]) == 14
    assert metrics["before"].keys() >= {"target_accuracy", "retained_accuracy", "unseen_accuracy", "became"}
    assert metrics["before"].keys() == metrics["after"].keys()
    assert metrics["change"].keys() == {"target", "unseen", "retained", "near", "cross_domain"}
    assert 800 <= Image.open(folder / "before-after.png").width <= 1000
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "CC BY 4.0" in report and "CLIP" in report
    assert len(report) < 2_000_000
    pipeline.load_lora_weights(folder / "erased")
    assert "Not measured" not in (folder / "erased" / "README.md").read_text()

    # Again with other settings: the new output replaces the old one, and the judged noise is not that of the training.
    real, seeds = fdu.draw, []

    def draw(pipeline: Any, probes: Any, seed: int, **named: Any) -> Any:
        seeds.append(seed)
        return real(pipeline, probes, seed=seed, **named)

    monkeypatch.setattr(fdu, "draw", draw)
    assert main(["demo", "digits", *QUICK, "--target", "red", "--anchor", "digit", "--seed", "7"]) == cli.OK
    assert json.loads((folder / "metrics.json").read_text())["target"] == "red"
    assert list(Path().iterdir()) == [folder] and seeds == [7 + JUDGED_SEED] * 2


def test_a_demo_that_fails_in_its_last_step_leaves_the_former_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_former()

    def fails(*given: Any, **named: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("fdu.report.write_run", fails)
    assert main(["demo", "digits", *QUICK]) == cli.FAILED
    assert "the disk is full" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["metrics.json"]
    assert list(Path().iterdir()) == [folder]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("thesis.tex", "mine"),
        ("metrics.json", "{"),
        ("metrics.json", "[1]"),
        ("metrics.json", '{"accuracy": 0.5}'),
    ],
)
def test_what_no_demo_wrote_is_refused(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("demo-out")
    folder.mkdir()
    (folder / name).write_text(text)
    assert main(["demo", "digits", *QUICK]) == cli.USAGE
    assert "--out" in capsys.readouterr().err
    assert (folder / name).read_text() == text


def test_a_demo_with_something_added_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_former()
    (folder / "notes.txt").write_text("mine")
    assert main(["demo", "digits", *QUICK]) == cli.USAGE
    assert "'notes.txt'" in capsys.readouterr().err


def make_former() -> Path:
    folder = Path("demo-out")
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"before": {}, "after": {}, "target": "x", "images_per_class": 1}))
    return folder


def test_an_output_that_appears_during_the_training_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fdu.evaluate

    def evaluate(*given: Any) -> Any:
        Path("demo-out").mkdir()
        Path("demo-out/mine").touch()
        return real(*given)

    monkeypatch.setattr(fdu, "evaluate", evaluate)
    assert main(["demo", "digits", *QUICK]) == cli.FAILED
    (kept,) = (path for path in map(Path, re.findall("'(.+?)'", capsys.readouterr().err)) if path.name != "demo-out")
    assert (kept / "erased" / "fdu.json").is_file() and (kept / "report.html").is_file()
    assert [path.name for path in Path("demo-out").iterdir()] == ["mine"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("by", ["environment", "argument"])
def test_make_clean_removes_only_what_is_made_here(by: str) -> None:
    def dry(target: str, *arguments: str, **environment: str) -> str:
        ran = subprocess.run(
            ["make", "--dry-run", "--directory", str(Path(__file__).parents[2]), target, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | environment,
        )
        return ran.stdout

    given = dry("clean", OUT="/precious") if by == "environment" else dry("clean", "OUT=/precious")
    assert "demo-out" in given and "/precious" not in given
    assert '--out "elsewhere"' in dry("demo", "OUT=elsewhere")
