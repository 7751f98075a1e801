"""`fdu evaluate` on pipelines that are not the embedded one: concept sets, CLIP as judge, what is refused."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
from families import CONCEPTS, WORDS, save_clip

import fdu
from fdu import cli
from fdu.cli import main
from fdu.subjects.digits import pipeline as digits


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), WORDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pipeline in a folder of its own: to fdu a pipeline like any other."""
    folder = tmp_path_factory.mktemp("base")
    digits.load_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set.txt").write_text(CONCEPTS)
    Path("weights").mkdir()
    Path("weights/pytorch_lora_weights.safetensors").touch()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["evaluate", *arguments]) == cli.USAGE
    return capsys.readouterr().err


def test_any_pipeline_is_judged_by_clip(base: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = fdu.erase(
        digits.load_pipeline(), "three", "eight", max_train_steps=2, train_batch_size=2, num_latents=4,
        num_inference_steps=2, rank=2, learning_rate=0.05, seed=0,
    )  # fmt: skip
    result.save("erased")
    quick = ["--images_per_class", "3", "--num_inference_steps", "2", "--batch_size", "2"]
    arguments = [str(base), "erased", "--prompts", "set.txt", "--judge", str(clip_folder), "--out", "judged"]
    assert main(["evaluate", *arguments, *quick]) == cli.OK
    output = capsys.readouterr().out
    assert "retained (4 classes)" in output and "generic (2 classes)" in output and "unrelated (1 class)" in output
    assert "CLIP score before" in output and f"in the features of {clip_folder}" in output
    metrics = json.loads(Path("judged/metrics.json").read_text())
    assert set(metrics["after"]["clip_score"]) == {"target", "unseen", "retained", "near", "generic", "unrelated"}
    assert metrics["target"] == "three" and metrics["anchor"] == "eight" and metrics["change"]["target"] > 0.001
    assert set(metrics["after"]["per_class"]) == {"three", "two", "eight", "zero", "ink"}
    assert Path("judged/report.html").is_file()

    assert main(["evaluate", *arguments[:2], *arguments[4:6], "--target", "three", *quick]) == cli.OK
    output = capsys.readouterr().out  # the prompts of the training, and the subjects of the package
    assert "generic (5 classes)" in output and "near" not in output

    assert main(["evaluate", "embedded", "erased", *arguments[4:6], "--images_per_class", "2", *quick[2:]]) == cli.OK
    output = capsys.readouterr().out
    assert "retained (9 classes)" in output and "CLIP score before" in output


def test_the_published_set_of_the_target_is_drawn(
    base: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}

    def draw(pipeline: Any, probes: list[fdu.Probe], **settings: Any) -> None:
        drawn.update(settings, names=[probe.name for probe in probes])
        raise RuntimeError("enough")

    monkeypatch.setattr(fdu, "draw", draw)
    arguments = [str(base), "weights", "--judge", str(clip_folder), "--target", "Van Gogh"]
    with pytest.raises(RuntimeError, match="enough"):
        cli.parse(["evaluate", *arguments]).prepare("")()
    assert drawn["names"][:3] == ["van gogh", "van gogh", "monet"] and "violin" in drawn["names"]
    # As the pipeline does by itself.
    assert drawn["num_inference_steps"] is None and drawn["guidance_scale"] is None and drawn["seed"] == 1000


def test_of_several_erased_concepts_the_others_are_not_to_be_kept(
    base: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []

    def draw(pipeline: Any, probes: list[fdu.Probe], **settings: Any) -> None:
        drawn.extend(probe.name for probe in probes)
        raise RuntimeError("enough")

    monkeypatch.setattr(fdu, "draw", draw)
    record = {
        "target": {"name": "van gogh, monet", "prompts": ["a van gogh", "a monet"]},
        "anchor": {"name": "painting, painting", "prompts": ["a painting", "a painting"]},
        "concepts": [["van gogh", "painting"], ["monet", "painting"]],
        "config": {"divergence": "mse", "max_train_steps": 1, "seed": 0},
        **{"sigma": 1.0, "seconds": 1.0, "history": {}, "versions": {}},
    }
    Path("weights/fdu.json").write_text(json.dumps(record))
    arguments = [str(base), "weights", "--judge", str(clip_folder), "--target", "van gogh"]
    with pytest.raises(RuntimeError, match="enough"):
        cli.parse(["evaluate", *arguments]).prepare("")()
    assert "monet" not in drawn and "salvador dali" in drawn


def test_what_cannot_be_judged_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [str(base), "weights"]
    assert "--target" in refused(model, capsys)
    assert "no concept set 'cat'" in refused([*model, "--target", "cat"], capsys)
    assert "no concept set 'cat'" in refused([*model, "--prompts", "cat"], capsys)
    assert "'gone.txt' does not exist" in refused([*model, "--prompts", "gone.txt"], capsys)
    other = [*model, "--prompts", "set.txt", "--target", "two"]
    assert "'three', not" in refused(other, capsys)
    monet = [*model, "--prompts", "monet"]
    assert "'gone' does not exist" in refused([*monet, "--judge", "gone"], capsys)
    assert "'weights'" in refused([*monet, "--judge", "weights"], capsys)
    assert ">= 1" in refused([*monet, "--batch_size", "0"], capsys)
    assert "guidance_scale" in refused([*monet, "--guidance_scale", "-1"], capsys)
    assert "prompts" in refused(["embedded", "weights", "--prompts", "monet"], capsys)
    assert "--robustness" in refused([*monet, "--robustness_batch_size", "2"], capsys)
    lone = [*monet, "--robustness", "--robustness_batch_size", "0"]
    assert "robustness_batch_size" in refused(lone, capsys)


@pytest.mark.parametrize("what", ["prompts", "phrasings", "judge", "base"])
def test_no_input_is_overwritten(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out/input").mkdir(parents=True)
    for name in ("config.json", "model_index.json", "set.txt"):
        Path("out/input", name).write_text(CONCEPTS)
    source = "out/input/set.txt" if what in ("prompts", "phrasings") else "out/input"
    base = source if what == "base" else "org/model"
    given = [] if what == "base" else [f"--{what}", source]
    rest = ["--target", "monet"] if what != "prompts" else []
    rest += ["--robustness"] if what == "phrasings" else []
    assert f"input '{source}'" in refused([base, "weights", *given, *rest, "--out", "out", "--overwrite"], capsys)


def test_the_device_is_chosen_as_for_an_erasure() -> None:
    defaults = [cli.parse(["evaluate", "a", "b"]), cli.parse(["erase", "a", "--target=b", "--anchor=c", "--out=d"])]
    assert {command.device for command in defaults} == {"auto"}  # type: ignore[attr-defined]


QUICK = ["--images_per_class", "1", "--num_inference_steps", "1", "--target", "three", "--device", "cpu"]


@pytest.mark.slow
def test_a_test_of_robustness_that_fails_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import fdu.cli.evaluate
    import fdu.evaluation.robustness.examination as examination

    def fails_before(*given: Any, **named: Any) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    def fails_after(*given: Any, **named: Any) -> None:
        found = json.loads(Path("judged/metrics.json").read_text())
        assert Path("judged/report.html").is_file() and found["robustness"]["phrasings"]
        raise KeyError("fault")

    monkeypatch.setattr(examination, "attack", fails_before)
    monkeypatch.setattr(examination, "relearn", fails_after)
    monkeypatch.setattr(fdu.cli.evaluate, "load_erased", lambda pipeline, *given: pipeline)
    arguments = ["embedded", "weights", *QUICK, "--out", "judged", "--robustness", "--robustness_batch_size", "1"]
    Path("mine.txt").write_text("a {}\n")
    assert main(["evaluate", *arguments, "--phrasings", "mine.txt"]) == cli.FAILED
    output = capsys.readouterr()
    assert re.search("attack.*CUDA out of memory.*relearning.*fault", output.err)
    assert "retained (9 classes)" in output.out and "other phrasings" in output.out and "report   judged" in output.out
    metrics = json.loads(Path("judged/metrics.json").read_text())
    assert set(metrics["robustness"]["phrasings"]) == {"mine"} and metrics["robustness"]["attack"] is None
    assert any(re.search("attack.*CUDA out of memory", note) for note in metrics["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_robustness_with_clip_as_judge(
    dtype: str, base: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fdu.cli.evaluate
    import fdu.evaluation.robustness as robustness

    real = robustness.Examination
    tiny = {
        "attack_config": robustness.AttackConfig(steps=1, restarts=1, looks=1, batch_size=1),
        "relearning_config": robustness.RelearningConfig(steps=1, looks=1, batch_size=1),
        "latents": 1,
    }
    monkeypatch.setattr(robustness, "Examination", lambda *given, **named: real(*given, **{**named, **tiny}))
    monkeypatch.setattr(fdu.cli.evaluate, "load_erased", lambda pipeline, *given: pipeline)
    arguments = [str(base), "weights", "--prompts", "set.txt", "--judge", str(clip_folder), "--dtype", dtype]
    assert main(["evaluate", *arguments, *QUICK, "--robustness", "--out", "judged"]) == cli.OK
    found = json.loads(Path("judged/metrics.json").read_text())
    assert {"paraphrases", "misspellings"} <= found["robustness"]["phrasings"].keys()
    assert len(found["robustness"]["attack"]["attempts"]) == 1
    assert found["robustness"]["relearning"]["course"] and "zero-shot" in found["notes"][0]


def test_two_pipelines_are_not_in_memory_together(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fdu.cli.evaluate

    real, loaded = fdu.cli.evaluate.load_model, []

    def load_model(*given: Any) -> Any:
        assert all(former() is None for former in loaded)
        pipeline = real(*given)
        loaded.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(fdu.cli.evaluate, "load_model", load_model)
    monkeypatch.setattr("fdu.subjects.subject.load_model", load_model)
    assert main(["evaluate", "embedded", str(base), *QUICK]) == cli.OK
    assert len(loaded) == 2


def test_a_set_in_the_output_folder_is_kept(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    model = [str(base), "weights"]
    Path("kept").mkdir()
    Path("set.txt").rename("kept/set.txt")
    inside = [*model, "--prompts", "kept/set.txt", "--out", "kept", "--overwrite"]
    assert "input 'kept/set.txt'" in refused(inside, capsys)
