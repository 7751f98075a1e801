"""`fdu evaluate` and `fdu report`: from erasures to pages, concept sets, CLIP as judge, robustness, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from families import CONCEPTS, WORDS, save_clip
from test_report import Page

import fdu
from fdu import cli
from fdu.cli import main
from fdu.evaluation import JUDGED_SEED
from fdu.models.quantization import quantization_of
from fdu.storage.output import sole_output
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.embedded import Emoji


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), WORDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits pipeline in a folder of its own: to fdu a pipeline like any other."""
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


def test_another_run_that_writes_to_out_is_told_before_any_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fdu, "draw", lambda *given, **named: pytest.fail("it draws"))
    fdu.erase(digits.load_pipeline(), "three", "eight", train_method="closed_form").save("erased")
    with ThreadPoolExecutor(1) as other, ExitStack() as stack:
        other.submit(stack.enter_context, sole_output("out")).result()
        assert main(["evaluate", "digits", "erased", "--out", "out"]) == cli.FAILED
        other.submit(stack.close).result()
    assert "output folder 'out' is in use by another run" in capsys.readouterr().err


ERASE = ["erase", "digits", "--target=three", "--anchor=eight", "--num_inference_steps=4", "--rank=4"]
ERASE += ["--train_batch_size=4", "--num_latents=8"]


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure of no step."""
    out = tmp_path_factory.mktemp("runs") / "idle"
    assert main([*ERASE, "--max_train_steps=0", f"--out={out}"]) == cli.OK
    return out


def evaluate(erased: Path, *more: str) -> tuple[Page, dict[str, Any]]:
    """The page and the metrics of an evaluation; `fdu report` makes the same page."""
    quick = ["--num_inference_steps=3", "--out=judged"]  # enough to draw the requested class
    assert main(["evaluate", "digits", str(erased), *quick, *more]) == cli.OK
    page = Path("judged/report.html").read_text(encoding="utf-8")
    Path("judged/report.html").unlink()
    assert main(["report", "judged"]) == cli.OK
    assert Path("judged/report.html").read_text(encoding="utf-8") == page
    return Page(page), json.loads(Path("judged/metrics.json").read_text())


def test_a_run_of_no_step_did_not_erase(idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, metrics = evaluate(idle, "--images_per_class=2")
    output = capsys.readouterr().out
    assert "not erased" in page.text and "not erased" in output and "retained (9 classes)" in output
    assert re.search("100 % of 2 images before.{,40}100 % after", page.text)
    assert not [svg for svg in page.all("svg") if (svg.get("aria-label") or "").startswith("Divergence")]
    assert set(metrics["change"].values()) == {0.0} and metrics["target"] == "three"
    assert metrics["command"].startswith("fdu evaluate digits")
    assert metrics["record"]["command"].startswith("fdu erase digits --target=three")
    assert len(metrics["record"]["fingerprint"]) == 64
    conditions = metrics["conditions"]
    assert conditions.pop("versions") == metrics["versions"] == metrics["record"]["versions"]
    sampling = {"num_inference_steps": 3, "guidance_scale": 3.0, "batch_size": 32}
    told = {"seed": 1000, "sampling": sampling, "judge": "digits classifier", "dtype": "float32", "size": None}
    told["prompts"] = f"the digits pipeline of fdu, version {fdu.__version__}"
    assert conditions == told
    names = {path.name for path in Path("judged").iterdir()}
    assert names == {"metrics.json", "images", "report.html", "before-after.png"}


@pytest.mark.slow
def test_a_run_that_broke_its_neighbours() -> None:
    trampling = ["--max_train_steps=12", "--learning_rate=0.03", "--preservation_weight=0"]
    assert main([*ERASE, *trampling, "--out=trampled"]) == cli.OK
    page, _ = evaluate(Path("trampled"), "--images_per_class=4")  # fewer could not show a loss
    assert re.search("three → eight [^.]*lost accuracy", page.text)
    assert re.search(r"\(\d+ % before, \d+ % after\)", page.text)
    assert "fingerprint" in page.text
    assert [svg for svg in page.all("svg") if (svg.get("aria-label") or "").startswith("Divergence")]


@pytest.mark.slow
def test_two_concepts_are_judged_together_or_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ERASE, "--target=red", "--anchor=black", "--max_train_steps=2", "--out=out"]) == cli.OK
    preserved = json.loads(Path("out/fdu.json").read_text())["config"]["preservation_prompts"]
    assert not any("three" in prompt or "red" in prompt for prompt in preserved)
    capsys.readouterr()
    assert main(["evaluate", "digits", "out", *QUICK[:4], "--target=red"]) == cli.OK
    assert "retained (3 classes)" in capsys.readouterr().out
    assert main(["evaluate", "digits", "out", *QUICK[:4], "--out=judged"]) == cli.OK
    told = capsys.readouterr().out
    assert "three and red" in told and "least erased:" in told and "retained (12 classes)" in told
    assert json.loads(Path("judged/metrics.json").read_text())["targets"] == ["three", "red"]
    assert "one concept, got 2" in refused(["digits", "out", "--robustness"], capsys)
    assert "'red' twice" in refused(["digits", "out", "--target=red", "--target=red"], capsys)


def test_unfit_folders_are_refused_before_any_work(idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(idle, "damaged")
    shutil.copytree(idle, "empty")
    Path("empty/fdu.json").write_text('{"a": 1}')
    record = json.loads(Path("damaged/fdu.json").read_text())
    Path("damaged/fdu.json").write_text(json.dumps(record | {"history": {"loss": ["x"]}}))
    capsys.readouterr()
    for arguments, message in (
        (["evaluate", "digits", "damaged"], "record.history.loss[0] must be int or float, got 'x'"),
        (["evaluate", "digits", "empty"], "record.target"),
        (["report", "none"], "not a folder"),
        (["report", str(idle)], "fdu evaluate"),
        (["evaluate", "digits", str(idle), "--phrasings", "x"], "--robustness"),
        (["evaluate", "digits", str(idle), "--robustness", "--phrasings", "x"], "not a file"),
    ):
        assert main(arguments) == cli.USAGE
        assert message in capsys.readouterr().err


def test_any_pipeline_is_judged_by_clip(base: Path, clip_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = fdu.erase(
        digits.load_pipeline(), "three", "eight", max_train_steps=2, train_batch_size=2, num_latents=4,
        num_inference_steps=2, rank=2, learning_rate=0.05, seed=0,
    )  # fmt: skip
    result.save("erased")
    quick = ["--images_per_class=2", "--num_inference_steps=1"]
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

    assert main(["evaluate", *arguments[:2], *arguments[4:6], "--target=three", *quick]) == cli.OK
    output = capsys.readouterr().out  # the prompts of the training, and the subjects of the package
    assert "generic (5 classes)" in output and "near" not in output

    assert main(["evaluate", "digits", "erased", *arguments[4:6], *quick]) == cli.OK
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
    arguments = [str(base), "weights", "--judge", str(clip_folder), "--target", "Van Gogh", "--seed", "5"]
    with pytest.raises(RuntimeError, match="enough"):
        cli.parse(["evaluate", *arguments]).prepare("")()
    assert drawn["names"][:3] == ["van gogh", "van gogh", "monet"] and "violin" in drawn["names"]
    # As the pipeline does by itself.
    assert drawn["num_inference_steps"] is None and drawn["guidance_scale"] is None
    assert drawn["seed"] == 5 + JUDGED_SEED


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
    drawn.clear()
    with pytest.raises(RuntimeError, match="enough"):
        cli.parse(["evaluate", *arguments[:-2]]).prepare("")()
    assert drawn[0] == "van gogh" and drawn.count("painting") == 1
    assert [name for name in drawn if name == "monet"] == ["monet"] * len({"target", "unseen"})


def test_what_cannot_be_judged_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [str(base), "weights"]
    assert "--target" in refused(model, capsys)
    assert "no concept set 'cat'" in refused([*model, "--target", "cat"], capsys)
    assert "no concept set 'cat'" in refused([*model, "--prompts", "cat"], capsys)
    assert "'gone.txt' does not exist" in refused([*model, "--prompts", "gone.txt"], capsys)
    other = [*model, "--prompts", "set.txt", "--target", "two"]
    assert "'three', not" in refused(other, capsys)
    monet = [*model, "--prompts", "monet"]
    assert "one target, got 2" in refused([*monet, "--target", "monet", "--target", "two"], capsys)
    assert "'gone' does not exist" in refused([*monet, "--judge", "gone"], capsys)
    assert "'weights'" in refused([*monet, "--judge", "weights"], capsys)
    assert ">= 1" in refused([*monet, "--batch_size", "0"], capsys)
    assert "guidance_scale" in refused([*monet, "--guidance_scale", "-1"], capsys)
    assert "prompts" in refused(["digits", "weights", "--prompts", "monet"], capsys)
    assert "--robustness" in refused([*monet, "--robustness_batch_size", "2"], capsys)
    lone = [*monet, "--robustness", "--robustness_batch_size", "0"]
    assert "robustness_batch_size" in refused(lone, capsys)


def test_concepts_that_leave_nothing_to_retain_are_refused_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Emoji, "load", lambda *given: pytest.fail("the pipeline was loaded"))
    targets = [f"--target={name}" for name in ("animal", "plant", "food")]
    with pytest.raises(ValueError, match="target: the concepts erased.*leave no class to retain"):
        cli.parse(["evaluate", "emoji", "weights", *targets]).prepare("")()


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


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ([], None),
        (["--resolution", "32"], (32, 32)),
        (["--height", "16", "--width", "32"], (16, 32)),
    ],
)
def test_images_have_the_size_that_is_given(
    given: list[str], size: tuple[int, int] | None, base: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examined: list[Any] = []
    sizes: list[Any] = []
    monkeypatch.setattr("fdu.evaluation.robustness.Examination.before", lambda self, pipeline: examined.append(self))
    monkeypatch.setattr("fdu.evaluation.robustness.Examination.each_after", lambda self, pipeline: [])
    draw = fdu.draw

    def noted(*arguments: Any, **settings: Any) -> Any:
        sizes.append((settings.get("height"), settings.get("width")))
        return draw(*arguments, **settings)

    monkeypatch.setattr(fdu, "draw", noted)
    few = ["--images_per_class", "1", "--num_inference_steps", "1", "--judge", str(clip_folder), "--prompts", "set.txt"]
    out = Path("out")
    arguments = ["evaluate", str(base), str(base), *few, "--robustness", "inversion", "--out", str(out), *given]
    assert main([*arguments, "--device", "cpu"]) == cli.OK
    assert sizes == [size or (None, None)] * 2 and examined[0].size == size
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["conditions"]["size"] == (None if size is None else list(size))
    page = Page((out / "report.html").read_text(encoding="utf-8")).text
    assert ("height and width" in page) == (size is not None)
    assert size is None or f"height and width {size[0]} x {size[1]}" in page


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
    arguments = ["digits", "weights", *QUICK, "--out", "judged", "--robustness", "--robustness_batch_size", "1"]
    Path("mine.txt").write_text("a {}\n")
    assert main(["evaluate", *arguments, "--phrasings", "mine.txt"]) == cli.FAILED
    output = capsys.readouterr()
    assert re.search("attack.*CUDA out of memory.*relearning.*fault", output.err)
    assert "retained (9 classes)" in output.out and "other phrasings" in output.out and "report   judged" in output.out
    metrics = json.loads(Path("judged/metrics.json").read_text())
    assert set(metrics["robustness"]["phrasings"]) == {"mine"} and metrics["robustness"]["attack"] is None
    assert any(re.search("attack.*CUDA out of memory", note) for note in metrics["notes"])


@pytest.fixture
def tiny_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of robustness of one step each."""
    import fdu.evaluation.robustness as robustness

    real = robustness.Examination
    tiny = {
        "attack_config": robustness.AttackConfig(steps=1, restarts=1, looks=1, batch_size=1),
        "relearning_config": robustness.RelearningConfig(steps=1, looks=1, batch_size=1),
        "drawing": robustness.JudgedSampling(num_inference_steps=2, images=1),
        "latents": 1,
    }
    monkeypatch.setattr(robustness, "Examination", lambda *given, **named: real(*given, **{**named, **tiny}))


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_tests")
def test_an_evaluation_with_robustness(idle: Path) -> None:
    Path("mine.txt").write_text("a {}\n", encoding="utf-8")
    page, metrics = evaluate(idle, "--images_per_class=1", "--robustness", "--phrasings=mine.txt")
    assert "Robustness" in page.text and "mine" in page.text
    labels = [svg["aria-label"] or "" for svg in page.all("svg") if svg.get("role") == "img"]
    assert [label.partition(".")[0] for label in labels] == ["Attack on the embeddings", "Relearning"]
    found = {name for name, one in metrics["robustness"].items() if one is not None}
    assert found == {"phrasings", "attack_before", "attack", "relearning"}


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_tests")
def test_robustness_in_half_precision_with_clip_as_judge(
    base: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fdu.cli.evaluate

    monkeypatch.setattr(fdu.cli.evaluate, "load_erased", lambda pipeline, *given: pipeline)
    arguments = [str(base), "weights", "--prompts=set.txt", f"--judge={clip_folder}", "--dtype=bfloat16"]
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
    assert main(["evaluate", "digits", str(base), *QUICK]) == cli.OK
    assert len(loaded) == 2


def test_both_pipelines_are_quantized_as_they_were_trained(idle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    original = fdu.draw

    def draw(pipeline: Any, *given: Any, **settings: Any) -> Any:
        drawn.append(quantization_of(pipeline))
        return original(pipeline, *given, **settings)

    monkeypatch.setattr(fdu, "draw", draw)
    short = ["--images_per_class=1", "--num_inference_steps=1", "--target=three"]
    assert main(["evaluate", "digits", str(idle), *short, "--quantization=int8"]) == cli.OK
    assert drawn == ["int8", "int8"]


def test_how_the_model_is_loaded_is_checked_first(idle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "revision goes with a hub id" in refused(["digits", str(idle), "--revision=main"], capsys)
    assert "offload serves transformers" in failed(["digits", str(idle), "--offload"], capsys)
    assert "could not be loaded" in failed(["digits", str(idle), "--variant=none"], capsys)


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["evaluate", *arguments]) != cli.OK
    return capsys.readouterr().err
