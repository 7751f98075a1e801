"""A comparison from end to end, small: its records, how it goes on, its folder, its page, and what is refused."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from families import CONCEPTS, WORDS, save_clip
from judged_runs import runs as handmade

import fdu
from fdu import cli
from fdu.cli import main
from fdu.cli.compare import Compare
from fdu.cli.erase import Erase
from fdu.cli.program import parse
from fdu.comparison import runs as runs_file
from fdu.comparison.chart import COLOURS, Curve, curve_chart, front_chart
from fdu.comparison.front import Sample
from fdu.comparison.output_folder import RUNS, check_folder, write_record
from fdu.comparison.page import alphas, describe, table, write_page
from fdu.comparison.plan import Candidate, Comparison, Drawing
from fdu.comparison.recommendation import BETA, recommend
from fdu.comparison.results import Results, read_results
from fdu.comparison.runs import jobs, read_record
from fdu.comparison.sweep import Records, digest, sweep
from fdu.config import EraseConfig
from fdu.subjects.digits import pipeline as digits
from fdu.training.loop import NotFinite

QUICK = {"max_train_steps": 3, "train_batch_size": 2, "num_latents": 4, "num_inference_steps": 2, "rank": 4}
PLAN = Comparison(
    model="embedded",
    pairs=(("three", "eight"),),
    candidates=(Candidate("mse"), Candidate("pearson_chi2", 10.0)),
    seeds=(0,),
    base=EraseConfig(**QUICK),
    drawing=Drawing(images_per_class=2, images_of_target=2, num_inference_steps=2),
)


def make_runs(comparison: Comparison, path: Path, cache: Path, **named: Any) -> None:
    sweep(jobs(comparison, cache), path, **named)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished comparison; not to be changed."""
    folder = tmp_path_factory.mktemp("comparison")
    torch.set_num_threads(1)  # as in the tests, or sums would round differently
    make_runs(PLAN, folder / RUNS, folder / "cache", tell=lambda line: None)
    return folder


def changed(made: Path, folder: Path, change: Callable[[str, dict[str, Any]], None]) -> Path:
    """The records of the finished comparison with a change, in another folder."""
    records = Records(made / RUNS)
    records.path = folder / RUNS
    for name, record in records.found.items():
        change(name, record)
    records.write(jobs(PLAN, folder))
    return records.path


@pytest.fixture
def no_erasure(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*given: Any, **named: Any) -> None:
        raise AssertionError("an erasure was made")

    monkeypatch.setattr(runs_file, "erase", forbidden)


def results_of(figures: dict[str, tuple[float, ...]], **others: Any) -> Results:
    """Results made by hand."""
    found, candidates = handmade(figures)
    sample = Sample(found, candidates)
    return Results(
        comparison=dataclasses.replace(PLAN, candidates=tuple(candidates)),
        runs=found,
        failed=others.get("failed", {}),
        missing=others.get("missing", 0),
        before={"three": (1.0, 0.99)},
        sample=sample,
        standings=tuple(sample.standings()),
        recommendations={prefer: recommend(sample, prefer) for prefer in BETA},
        conditions={"device": "cpu: some", "versions": {"fdu": "0", "torch": "1"}},
        mixed=others.get("mixed", ()),
        seconds=2.0,
        core_seconds=3.0,
    )


def test_a_record_says_all(made: Path) -> None:
    records = Records(made / RUNS).found
    record = records["three_eight_divergence=mse_s0=1_seed=0"]
    assert record["identity"]["settings"]["preservation_prompts"] == digest(list(digits.preserved("three")))
    assert record["device"].startswith("cpu") and record["versions"].keys() >= {"torch", "fdu"}
    assert record["core_seconds"] > 0
    assert record["sigma"] > 0 and len(record["distance"].split()) == 3
    roles = [(one["role"], len(one["hits"]), len(one["change"].split())) for one in record["judged"]]
    assert roles == [("target", 2, 2), ("unseen", 2, 2)] + [("retained", 2, 2)] * 9 + [("cross_domain", 2, 2)] * 4
    before = records["before_three"]
    assert len(before["judged"]) == 15 and before["judged"][0]["change"] is None
    assert len(records) == 3 and {path.name for path in made.iterdir()} == {RUNS, "runs.lock", "cache"}


def test_a_run_trains_what_fdu_erase_trains(made: Path, pipeline: StableDiffusionPipeline) -> None:
    """Also the second run of one process, with latents and frozen outputs from the cache."""
    for run in PLAN.runs():
        target, anchor = digits.concepts("three", "eight")
        settings = {**QUICK, **run.candidate.settings, "preservation_prompts": digits.preserved("three")}
        result = fdu.erase(pipeline, target, anchor, **settings)
        result.trainable.remove()
        beforehand = fdu.erase(pipeline, target, anchor, **settings, frozen_batches=QUICK["max_train_steps"])
        beforehand.trainable.remove()
        for column, values in beforehand.history.items():  # frozen outputs of several batches a pass round differently
            assert values == pytest.approx(result.history[column], rel=1e-3, abs=1e-6)
        record = Records(made / RUNS).found[run.name]
        assert record["distance"] == " ".join(f"{value:.4g}" for value in beforehand.history["distance"])
        assert record["sigma"] == beforehand.sigma
    assert {path.name.split("-")[0] for path in (made / "cache").iterdir()} == {
        "prompts",
        "latents",
        "frozen",
        "before",
    }
    assert len(list((made / "cache").glob("frozen-*"))) == len(list((made / "cache").glob("latents-*"))) == 1


@pytest.mark.usefixtures("no_erasure")
def test_what_is_there_is_not_made_again(made: Path, tmp_path: Path) -> None:
    make_runs(PLAN, made / RUNS, made / "cache")
    records = Records(made / RUNS)
    path = changed(made, tmp_path, lambda name, record: None)
    for change in ({"learning_rate": 1.0}, {"max_train_steps": 4}):
        other = dataclasses.replace(PLAN, base=dataclasses.replace(PLAN.base, **change))
        with pytest.raises(AssertionError, match="an erasure was made"):
            make_runs(other, path, made / "cache")
    more = dataclasses.replace(PLAN, candidates=(*PLAN.candidates, Candidate("le_cam")))
    assert [read_record(more, records, run) is not None for run in more.runs()] == [True, True, False]
    redrawn = dataclasses.replace(PLAN, drawing=Drawing(num_inference_steps=3))
    assert all(read_record(redrawn, records, run) is None for run in redrawn.runs())


def test_a_setting_that_a_record_lacks_had_its_default(made: Path, tmp_path: Path) -> None:
    run = PLAN.runs()[0]
    path = changed(made, tmp_path, lambda name, record: record["identity"].get("settings", {}).pop("snr_gamma", None))
    assert read_record(PLAN, Records(path), run) is not None
    # Of this one the run has another value.
    path = changed(made, tmp_path, lambda name, record: record["identity"].get("settings", {}).pop("rank", None))
    assert read_record(PLAN, Records(path), run) is None


def test_a_stop_loses_one_run_and_a_loss_that_is_not_finite_its_candidate(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = runs_file.erase, []

    def stopped(*given: Any, **named: Any) -> Any:
        calls.append(named["config"].divergence)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(runs_file, "erase", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_runs(PLAN, tmp_path / RUNS, made / "cache", tell=lambda line: None)
    assert [read_record(PLAN, Records(tmp_path / RUNS), run) is not None for run in PLAN.runs()] == [True, False]

    def lost(*given: Any, **named: Any) -> None:
        raise NotFinite("the loss became nan at step 1; the pipeline draws as before")

    monkeypatch.setattr(runs_file, "erase", lost)
    told: list[str] = []
    make_runs(PLAN, tmp_path / RUNS, made / "cache", tell=told.append)
    assert told == ["1/1 three_eight_divergence=pearson_chi2_s0=10_seed=0"]
    results = read_results(PLAN, tmp_path / RUNS)
    assert results.failed == {PLAN.runs()[1].name: "the loss became nan at step 1"}
    assert [one.candidate for one in results.standings] == [Candidate("mse")]
    make_runs(PLAN, tmp_path / RUNS, made / "cache", tell=told.append)
    assert len(told) == 1


@pytest.mark.slow
def test_without_a_cache_the_images_before_are_still_those_of_the_model_as_it_is(made: Path, tmp_path: Path) -> None:
    """A run that is gone on with elsewhere, from the records alone."""
    run = PLAN.runs()[1]
    records = Records(made / RUNS)
    records.path = tmp_path / RUNS
    first = records.found.pop(run.name)
    records.write(jobs(PLAN, tmp_path))
    told: list[str] = []
    make_runs(PLAN, tmp_path / RUNS, tmp_path / "cache", tell=told.append)
    assert told == [f"1/1 {run.name}"]
    assert Records(tmp_path / RUNS).found[run.name]["judged"] == first["judged"]
    (kept,), (true,) = ((folder / "cache").glob("before-*") for folder in (tmp_path, made))
    assert kept.name == true.name and kept.read_bytes() == true.read_bytes()


@pytest.mark.slow
def test_processes_make_what_one_makes(made: Path, tmp_path: Path) -> None:
    make_runs(PLAN, tmp_path / RUNS, tmp_path / "cache", workers=2, tell=lambda line: None)
    one, several = (Records(folder / RUNS).found for folder in (made, tmp_path))
    for records in (one, several):
        for record in records.values():
            record.pop("seconds", None), record.pop("core_seconds", None), record.pop("device")
    assert one == several


def test_results_tell_what_is_missing(made: Path) -> None:
    more = dataclasses.replace(PLAN, seeds=(0, 1))
    results = read_results(more, made / RUNS)
    assert results.missing == 2 and results.sample.seeds == 1
    with pytest.raises(ValueError, match="0 of 2 records"):
        read_results(dataclasses.replace(PLAN, seeds=(5,)), made / RUNS)


def test_records_of_several_places_are_told(made: Path, tmp_path: Path) -> None:
    assert read_results(PLAN, made / RUNS).mixed == ()

    def elsewhere(name: str, record: dict[str, Any]) -> None:
        if "pearson" in name:
            record["device"] = "cuda: another"
            record["versions"]["torch"] = "0.1"
            del record["versions"]["peft"]

    results = read_results(PLAN, changed(made, tmp_path, elsewhere))
    assert results.mixed == ("device", "torch", "peft")
    assert re.fullmatch(r"cpu: .*; cuda: another", results.conditions["device"])
    assert results.conditions["versions"]["torch"].endswith("; 0.1")
    assert results.conditions["versions"]["peft"].endswith("; none")
    assert describe(results)["mixed"] == ["device", "torch", "peft"]
    write_page(tmp_path, results, "balanced", notes=["Last."])
    assert "(device, torch, peft)" in (tmp_path / "comparison.html").read_text()


def test_a_target_that_the_model_hardly_draws_has_no_winner(made: Path, tmp_path: Path) -> None:
    def unseen(name: str, record: dict[str, Any]) -> None:
        for one in record["judged"]:
            if one["role"] in ("target", "unseen"):
                one["hits"] = "00"

    for found in read_results(PLAN, changed(made, tmp_path, unseen)).recommendations.values():
        assert not found.usable and "'three'" in found.headline and "0 %" in found.headline


class _Reader(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_stands_alone_and_says_what_was_found(tmp_path: Path) -> None:
    figures = {"mse": (0.6, 1.0, 0.02), "squared_hellinger": (0.9, 1.0, 0.01), "alpha:1.5": (0.5, 0.9, 0.03)}
    results = results_of(figures, failed={"a run": "the loss became nan"}, missing=3)
    alike = {"kl": "mse", "reverse_kl": "mse", "alpha:-0.5": "alpha:1.5"}
    write_page(tmp_path, results, "balanced", alike, "fdu compare <all>", "fdu erase it", ["Read <this>."])
    page = (tmp_path / "comparison.html").read_text()
    reader = _Reader()
    reader.feed(page)
    assert reader.links == [] and "script" not in reader.tags and "url(" not in page
    words = re.sub(r"\s+", " ", " ".join(reader.words))
    for part in (
        results.recommendations["balanced"].headline,
        "90.0 (",
        "kl, reverse_kl",
        "3 runs",
        "a run: the loss became nan",
        "fdu compare <all>",
        "fdu erase it",
        "Read <this>.",
        "By alpha, s0 1",
    ):
        assert part in words, part
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"comparison.html", "comparison.md", "front.svg", "change.svg", "alpha-s0-1.svg"}
    for path in tmp_path.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    rows = (tmp_path / "comparison.md").read_text().splitlines()
    assert len(rows) == 5 and rows[2].startswith("| squared_hellinger (s0 1) | 90.0 (") and "| yes (" in rows[2]
    described = describe(results)
    assert described["recommendations"]["erasure"]["settings"] == {"divergence": "squared_hellinger", "s0": 1.0}
    json.dumps(described)


def test_alphas_are_found_under_every_name() -> None:
    standings = results_of({"mse": (0.6, 1.0), "squared_hellinger": (0.9, 1.0), "alpha:1.5": (0.5, 0.9)}).standings
    alike = {"kl": "mse", "reverse_kl": "mse", "alpha:-0.5": "alpha:1.5", "alpha:0.5": "squared_hellinger"}
    (points,) = alphas(standings, alike).values()
    assert [(alpha, one.candidate.divergence) for alpha, one in points] == [
        (-0.5, "alpha:1.5"), (0.0, "mse"), (0.5, "squared_hellinger"), (1.0, "mse"), (1.5, "alpha:1.5"),
    ]  # fmt: skip


def test_charts_put_points_where_they_belong() -> None:
    results = results_of({"mse": (0.25, 1.0), "kl": (0.75, 0.5), "le_cam": (0.2, 0.4)})
    root = ElementTree.fromstring(front_chart(results.standings))
    circles = [one for one in root.iter() if one.tag.endswith("circle")]
    places = {(float(one.get("cx", 0)), float(one.get("cy", 0))): one.get("fill") for one in circles}
    (first, second, third) = list(places)
    assert first[0] < second[0] and first[1] < second[1]  # further right, and lower
    assert places[first] != "none" and places[second] != "none" and places[third] == "none"  # dominated, so hollow
    assert "mse (s0 1); kl (s0 1)" in str(root.get("aria-label"))
    curve = Curve("left & right", [(20, results.standings[0].erased), (80, results.standings[1].erased)], COLOURS[0])
    label = ElementTree.fromstring(curve_chart([curve], "steps", "share (%)", whole=True)).get("aria-label")
    assert "left & right: 20: 25.0 % (" in str(label)


def test_one_candidate_makes_a_page_too(tmp_path: Path) -> None:
    results = results_of({"mse": (0.5, 1.0)})
    write_page(tmp_path, results, "erasure")
    assert results.recommendations["erasure"].headline in (tmp_path / "comparison.html").read_text()
    assert table(results_of({"mse": (0.5, 1.0)}).standings).count("\n") == 3


def test_a_folder_goes_on_only_with_its_own_settings(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    check_folder(folder, PLAN)
    assert not folder.exists()
    write_record(folder, PLAN, "fdu compare")
    check_folder(folder, PLAN)
    check_folder(folder, dataclasses.replace(PLAN, candidates=(Candidate("le_cam", 4.0),), seeds=(0, 1, 2, 3)))
    other = dataclasses.replace(PLAN, base=dataclasses.replace(PLAN.base, max_train_steps=60))
    with pytest.raises(FileExistsError, match="max_train_steps 3, not 60"):
        check_folder(folder, other)
    with pytest.raises(FileExistsError, match="pairs"):
        check_folder(folder, dataclasses.replace(PLAN, pairs=(("red", "blue"),)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="'thesis.tex'.*no comparison.json"):
        check_folder(tmp_path / "full", PLAN)


COMPARE = ["compare", "embedded", "--target", "three", "--anchor", "eight", "--out", "out", "--divergences", "mse,kl"]


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    real = runs_file.draw
    monkeypatch.setattr(runs_file, "draw", lambda *given, **named: real(*given, **{**named, "num_inference_steps": 2}))
    quick = [f"--{name}={value}" for name, value in QUICK.items()]
    given = [*COMPARE, "--s0", "1", "10", "--seeds", "1", "--images_per_class", "2", "--workers", "1"]
    assert main([*given, *quick]) == cli.OK
    output = capsys.readouterr().out
    assert re.search("kl .*same .*mse", output)
    assert "3/3 three_eight_divergence=mse_s0=10_seed=0" in output
    assert "Nothing to recommend" in output and "fdu erase" not in output  # hardly trained
    folder = Path("out")
    assert {path.name for path in folder.iterdir()} >= {"comparison.html", "comparison.md", "comparison.json", RUNS}
    record = json.loads((folder / "comparison.json").read_text())
    assert len(record["results"]["candidates"]) == 2 and record["command"].startswith("fdu compare embedded")
    monkeypatch.setattr(runs_file, "erase", None)  # all is there
    assert "fdu erase" not in (folder / "comparison.html").read_text()
    monkeypatch.setattr("fdu.comparison.recommendation.HARDLY", 0.0)
    assert main([*given, *quick, "--prefer", "erasure"]) == cli.OK
    output = capsys.readouterr().out
    assert "erasure" in output
    assert re.search("fdu erase embedded --target three --anchor eight .*--divergence", output)


def test_the_erasure_to_make_is_the_one_that_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the parser of fdu erase, and compared with the settings of the run."""
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/model_index.json").write_text("{}")
    words = ["compare", "base", "--target", "monet's", "--anchor", "", "--out", "out", "--concept_type", "style"]
    words += [
        "--dtype",
        "bfloat16",
        "--mixed_precision",
        "bf16",
        "--device",
        "cpu",
        "--learning_rate",
        "0.000123456789",
    ]
    compare = parse([*words, "--preservation_prompts", "a cat", "two dogs", "--gradient_checkpointing"])
    assert isinstance(compare, Compare)
    base, candidate = compare.settings.checked(), {"divergence": "alpha:0.3", "s0": 1.23456789}
    line = shlex.split(compare._erase_command({**base.as_dict(), **candidate}, candidate))
    erase = parse(line[1:])
    assert isinstance(erase, Erase)
    assert (erase.model, erase.target, erase.anchor) == ("base", ("monet's",), ("",))
    assert (erase.concept_type, erase.dtype, erase.device) == (("style",), "bfloat16", "cpu")
    assert erase.settings.checked() == dataclasses.replace(base, **candidate)


@pytest.mark.slow
def test_other_models_are_judged_by_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    digits.load_pipeline().save_pretrained("base")  # a pipeline like any other
    save_clip(Path("clip"), WORDS)
    Path("set.txt").write_text(CONCEPTS)
    given = ["compare", "base", *COMPARE[2:], "--judge", "clip", "--prompts", "set.txt", "--seeds", "1"]
    drawn = ["--images_per_class", "2", "--judged_inference_steps", "2", "--judged_guidance_scale", "3"]
    quick = [f"--{name}={value}" for name, value in QUICK.items()]
    assert main([*given, *drawn, *quick]) == cli.OK
    assert "2/2 three_eight_divergence=mse_s0=1_seed=0" in capsys.readouterr().out
    (record,) = (record for name, record in Records(Path("out") / RUNS).found.items() if name.startswith("three_"))
    roles = [(one["role"], one["name"]) for one in record["judged"]]
    assert roles == [("target", "three"), ("unseen", "three")] + [
        ("retained", name) for name in ("two", "eight", "zero", "ink")
    ]
    assert record["identity"]["judge"] == "clip" and record["identity"]["concept_set"]
    monkeypatch.setattr(runs_file, "erase", None)
    assert main([*given, *drawn, *quick]) == cli.OK  # all is there
    Path("set.txt").write_text(CONCEPTS.replace("a scan of", "a drawing of"))
    assert main([*given, *drawn, *quick]) == cli.FAILED  # runs are to be made anew, which this test forbids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--divergences": "--judge", "mse,kl": "org/clip"}, "judge.*embedded"),
        ({"--divergences": "--prompts", "mse,kl": "monet"}, "prompts.*embedded"),
        ({"embedded": "org/model", "--divergences": "--prompts", "mse,kl": "monet"}, "'monet'"),
        ({"--divergences": "--judged_inference_steps", "mse,kl": "0"}, "judged_inference_steps.*>= 1"),
        ({"mse,kl": "mse,helinger"}, "divergence 'helinger'"),
        ({"three": "eleven"}, "target.*digit"),
        ({"out": "."}, "working folder"),
        ({"--divergences": "--alpha", "mse,kl": "-1:2"}, "alpha.*low:high:count"),
        ({"--divergences": "--seeds", "mse,kl": "0"}, "seeds.*>= 1"),
        ({"--divergences": "--workers", "mse,kl": "0"}, "workers.*>= 1"),
        ({"--divergences": "--s0", "mse,kl": "-1"}, "s0.*> 0"),
        ({"--divergences": "--learning_rate", "mse,kl": "-1"}, "learning_rate.*> 0"),
        ({"--divergences": "--images_per_class", "mse,kl": "1"}, "images_per_class.*>= 2"),
    ],
)
def test_the_command_refuses_before_any_work(
    change: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(digits, "load_pipeline", None)
    assert main([change.get(word, word) for word in COMPARE]) == cli.USAGE
    output = capsys.readouterr()
    assert re.search(message, output.err) and output.err.count("\n") == 1 and output.out == ""
    assert not list(Path().iterdir())


def test_settings_that_runs_do_not_share_are_no_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == cli.OK
    shown = capsys.readouterr().out
    assert "--learning_rate" in shown and "--alpha" in shown and "fdu compare embedded" in shown
    for name in ("--divergence ", "--seed ", "--cache_dir", "--checkpoint_dir", "--resume_from_checkpoint"):
        assert name not in shown, name
