"""Runs that did not do what they should, from the command line to the page, which has to say so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import Page

import fdu
from fdu import cli
from fdu.cli import main

SMALL = ["--train_batch_size=4", "--num_latents=8", "--num_inference_steps=4"]
IMAGES = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an erasure of no step, and one that trampled on everything."""
    folder = tmp_path_factory.mktemp("runs")
    erase = ["erase", "embedded", "--target", "three", "--anchor", "eight", *SMALL]
    assert main([*erase, "--max_train_steps=0", "--out", str(folder / "idle")]) == cli.OK
    trampling = ["--max_train_steps=12", "--learning_rate=0.03", "--preservation_weight=0"]
    assert main([*erase, *trampling, "--out", str(folder / "trampled")]) == cli.OK
    return folder


@pytest.fixture(autouse=True)
def few_inference_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for the pipeline to draw what it is asked for."""
    real = fdu.draw
    monkeypatch.setattr(fdu, "draw", lambda *given, **named: real(*given, **{**named, "num_inference_steps": 8}))


def evaluate(erased: Path, out: Path, *more: str, images: int = IMAGES) -> Page:
    """The page of an evaluation, which is the same when it is made anew."""
    assert main(["evaluate", "embedded", str(erased), f"--images_per_class={images}", "--out", str(out), *more]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == cli.OK
    assert (out / "report.html").read_text(encoding="utf-8") == page
    return Page(page)


def test_a_run_of_no_step_did_not_erase(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = evaluate(runs / "idle", tmp_path / "judged")
    assert "not erased" in page.text and "not erased" in capsys.readouterr().out
    assert re.search(rf"100 % of {IMAGES} images before.{{,40}}100 % after", page.text)
    assert not [svg for svg in page.all("svg") if (svg.get("aria-label") or "").startswith("Divergence")]
    metrics = json.loads((tmp_path / "judged/metrics.json").read_text())
    assert set(metrics["change"].values()) == {0.0}
    assert metrics["record"]["command"].startswith("fdu erase embedded --target three")
    assert len(metrics["record"]["fingerprint"]) == 64
    sampling = {"num_inference_steps": 20, "guidance_scale": 3.0, "batch_size": 32}
    conditions = metrics["conditions"]
    assert conditions.pop("versions") == metrics["versions"] == metrics["record"]["versions"]
    assert conditions == {"seed": 1000, "sampling": sampling, "judge": "embedded classifier", "dtype": "float32"}


@pytest.mark.slow
def test_a_run_that_broke_its_neighbours(runs: Path, tmp_path: Path) -> None:
    page = evaluate(runs / "trampled", tmp_path / "judged", images=4)  # fewer could not tell whether it erased
    headline = page.text.partition("three → eight")[2].partition(".")[0]
    assert "three" in headline and "erased" in headline and "but" in headline
    assert re.search(r"\(\d+ % before, \d+ % after\)", page.text)
    assert "fingerprint" in page.text
    assert [svg for svg in page.all("svg") if (svg.get("aria-label") or "").startswith("Divergence")]


@pytest.mark.slow
def test_a_wrong_target(runs: Path, tmp_path: Path) -> None:
    page = evaluate(runs / "trampled", tmp_path / "judged", "--target", "five")
    assert "five →" not in page.text and re.search("three, not five", page.text)
    assert json.loads((tmp_path / "judged/metrics.json").read_text())["anchor"] is None


@pytest.mark.slow
def test_an_evaluation_with_robustness(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny: dict[str, Any] = {"num_inference_steps": 2, "images": 1}
    import fdu.evaluation.robustness as robustness

    real = robustness.Examination
    configs = {
        "attack_config": robustness.AttackConfig(steps=1, restarts=1, looks=1, batch_size=1),
        "relearning_config": robustness.RelearningConfig(steps=1, looks=1, batch_size=1),
        "drawing": robustness.JudgedSampling(**tiny),
        "latents": 1,
    }
    monkeypatch.setattr(robustness, "Examination", lambda *given, **named: real(*given, **{**named, **configs}))
    (tmp_path / "mine.txt").write_text("a {}\n", encoding="utf-8")
    page = evaluate(runs / "idle", tmp_path / "judged", "--robustness", "--phrasings", str(tmp_path / "mine.txt"))
    assert "Robustness" in page.text and "mine" in page.text
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert [label.partition(".")[0] for label in labels] == ["Attack on the embeddings", "Relearning"]
    found = json.loads((tmp_path / "judged/metrics.json").read_text())["robustness"]
    assert found.keys() == {"phrasings", "attack_before", "attack", "relearning"}


def test_report_and_robustness_refuse_before_any_work(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((runs / "idle/fdu.json").read_text())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/fdu.json").write_text(json.dumps(record | {"history": {"loss": ["x"]}}))
    (tmp_path / "damaged/pytorch_lora_weights.safetensors").touch()
    refusals = [
        (["evaluate", "embedded", str(tmp_path / "damaged")], "record.history.loss[0] is wrong: 'x'"),
        (["report", str(tmp_path / "none")], "not a folder"),
        (["report", str(runs / "idle")], "fdu evaluate"),
        (
            ["evaluate", "embedded", str(runs / "idle"), "--phrasings", "x"],
            "--robustness",
        ),
        (["evaluate", "embedded", str(runs / "idle"), "--robustness", "--phrasings", "x"], "no file"),
    ]
    capsys.readouterr()
    for arguments, message in refusals:
        assert main(arguments) == cli.USAGE
        assert message in capsys.readouterr().err
