"""A comparison: its plan, its runs and records, its folder, its page, and the command from end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from families import CONCEPTS, WORDS, save_clip
from judged_runs import runs as handmade
from PIL import Image
from safetensors.torch import load_file
from test_report import Page

import fdu
import fdu_kernels as fk
from fdu import cli
from fdu.cli import main
from fdu.cli.compare import Compare
from fdu.cli.erase import Erase
from fdu.cli.evaluate import Evaluate
from fdu.cli.program import parse
from fdu.comparison import runs as runs_file
from fdu.comparison.front import Sample
from fdu.comparison.gallery import galleries
from fdu.comparison.page import COLOURS, Curve, alphas, curve_chart, front_chart, table, write_page
from fdu.comparison.plan import Candidate, Comparison, Drawing, Run, distinct, read_alpha
from fdu.comparison.recommendation import preferences, recommend
from fdu.comparison.results import RECORD, RUNS, Results, check_folder, describe, read_results, write_record
from fdu.comparison.runs import identity_of, jobs, make_run
from fdu.comparison.sweep import Record, Records, digest, sweep
from fdu.config import EraseConfig
from fdu.evaluation import JUDGED_SEED
from fdu.subjects.digits import pipeline as digits
from fdu.subjects.registry import subject_of
from fdu.training.loop import NotFinite

QUICK = {"max_train_steps": 3, "train_batch_size": 2, "num_latents": 4, "num_inference_steps": 2, "rank": 4}
PLAN = Comparison(
    model="digits",
    pairs=(("three", "eight"),),
    candidates=(Candidate("mse", 10.0), Candidate("pearson_chi2", 10.0)),
    seeds=(0,),
    base=EraseConfig(**QUICK),
    drawing=Drawing(images_per_class=2, images_of_target=2, num_inference_steps=1),
)
COMPARE = ["compare", "digits", "--target", "three", "--anchor", "eight", "--out", "out", "--divergences", "mse,kl"]
SMALL = ["--seeds=1", "--images_per_class=2", "--judged_inference_steps=1", "--workers=1"]
SMALL += [f"--{name}={value}" for name, value in QUICK.items()]
PLANNED = [*COMPARE[:-1], "mse,kl,pearson_chi2", "--s0=10", *SMALL]
"""The command line of PLAN."""


def make_runs(comparison: Comparison, path: Path, cache: Path, **named: Any) -> None:
    sweep(jobs(comparison, cache), path, **named)


def record_of(records: Records, comparison: Comparison, run: Run) -> Record | None:
    return records.of(run.name, identity_of(comparison, run))


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of the finished command; not to be changed."""
    torch.set_num_threads(1)  # as in the tests, or sums would round differently
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(output):
        patched.chdir(tmp_path_factory.mktemp("comparison"))
        assert main(PLANNED) == cli.OK
        return Path("out").resolve(), output.getvalue()


@pytest.fixture(scope="module")
def made(command: tuple[Path, str]) -> Path:
    """The folder of the finished comparison."""
    return command[0]


def comparison(**others: Any) -> Comparison:
    given = {"model": "digits", "pairs": (("three", "eight"),), "candidates": (Candidate("mse"),), **others}
    return Comparison(**given)


def test_quantized_runs_have_an_identity_and_whole_ones_keep_theirs(tmp_path: Path) -> None:
    whole = comparison(base=EraseConfig(**QUICK), drawing=PLAN.drawing)
    quantized = dataclasses.replace(whole, quantization="int8")
    assert whole.conditions().keys() == {"dtype", "drawing", "prompts", "judge"}
    assert quantized.conditions() == {**whole.conditions(), "quantization": "int8"}
    assert dataclasses.replace(whole, offload=True).conditions() == whole.conditions()
    write_record(tmp_path / "begun", whole, "fdu compare")
    for other in (quantized, dataclasses.replace(whole, variant="fp16")):
        with pytest.raises(FileExistsError, match="holds a comparison with (quantization 'none'|variant None), not"):
            check_folder(tmp_path / "begun", other)
    run = quantized.runs()[0]
    assert identity_of(quantized, run)["weights"] != identity_of(whole, run)["weights"]
    assert len(make_run(run, quantized, tmp_path)["judged"]) == len(make_run(run, whole, tmp_path)["judged"])


def test_the_commands_of_a_quantized_comparison_load_the_same_model(capsys: pytest.CaptureFixture[str]) -> None:
    loading = ["--quantization", "int8", "--variant", "fp16"]
    compare: Any = parse([*PLANNED, *loading])
    for command in (compare._erase_command(compare._base(), Candidate("mse")), compare._evaluate_command()):
        assert " ".join(loading) in command
    assert main([*COMPARE[:-2], *SMALL, *loading, "--methods=full,lora"]) == cli.USAGE
    assert "quantization 'int8' needs train_method 'lora'" in capsys.readouterr().err
    assert main([*PLANNED, "--revision=main"]) == cli.USAGE
    assert "revision goes with a hub id" in capsys.readouterr().err


def test_a_pipeline_that_judges_itself_refuses_another_judge_by_its_title() -> None:
    with pytest.raises(ValueError, match="judge: the digits pipeline of fdu has its own"):
        comparison(judge="org/clip").check_names()


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
        before={"three": (1.0, 0.99, others.get("attributes", math.nan))},
        sample=sample,
        standings=tuple(sample.standings()),
        recommendations={prefer: recommend(sample, prefer) for prefer in preferences(sample)},
        conditions={"device": "cpu: some", "versions": {"fdu": "0", "torch": "1"}},
        mixed=others.get("mixed", ()),
        seconds=2.0,
        core_seconds=3.0,
    )


def test_alpha_is_a_grid_with_its_limits() -> None:
    names = ["alpha:-1", "alpha:-0.5", "reverse_kl", "alpha:0.5", "kl", "alpha:1.5", "alpha:2"]
    assert read_alpha("-1:2:7") == names
    assert read_alpha("0.1:0.3:3") == ["alpha:0.1", "alpha:0.2", "alpha:0.3"]
    assert read_alpha("0.7:1.3:7")[3] == "kl"  # 0.7 + 3 * 0.1 is not 1 in binary
    assert read_alpha("3:3:1") == ["alpha:3"]
    for name in names:
        fk.get_divergence(name)


@pytest.mark.parametrize("text", ["-1:2", "a:b:c", "0:1:2.5", "2:-1:7", "0:1:0", "0:1:1", "1:1:2"])
def test_other_alphas_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="alpha.*low:high:count"):
        read_alpha(text)


def test_divergences_that_train_alike_are_run_once() -> None:
    kept, alike = distinct(["mse", *read_alpha("-1:2:7"), "squared_hellinger", "pearson_chi2", "le_cam"])
    assert kept == ["mse", "alpha:-1", "alpha:-0.5", "alpha:0.5", "le_cam"]
    assert alike == {
        "reverse_kl": "mse",
        "kl": "mse",
        "alpha:1.5": "alpha:-0.5",
        "alpha:2": "alpha:-1",
        "squared_hellinger": "alpha:0.5",
        "pearson_chi2": "alpha:-1",
    }


def test_alike_are_those_whose_gradients_are_multiples() -> None:
    """Against the losses themselves."""
    names = [str(fk.get_divergence(name)) for name in fk.divergences()]
    kept, alike = distinct(names)
    target = torch.zeros(12, 1, dtype=torch.float64)
    pred = torch.logspace(-1, 0.9, 12, dtype=torch.float64)[:, None]
    gradient = {name: fk.gaussian_divergence_value_and_grad(pred, target, name)[1] for name in names}

    def multiple(one: str, other: str) -> bool:
        ratio = gradient[one] / gradient[other]
        return torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-6)

    assert all(multiple(name, run) for name, run in alike.items())
    assert not any(multiple(one, other) for place, one in enumerate(kept) for other in kept[:place])


def test_with_a_critic_every_generator_trains_its_own() -> None:
    assert distinct(["kl", "reverse_kl", "kl"], variational=True) == (["kl", "reverse_kl"], {})
    with pytest.raises(ValueError, match="helinger"):
        distinct(["helinger"])


def test_runs_are_candidates_times_targets_times_seeds_with_names_of_their_own() -> None:
    plan = comparison(
        pairs=(("three", "eight"), ("red", "green")),
        candidates=(Candidate("alpha:0.3", 10.0), Candidate("kl", 1.0, (("variational", True),))),
        seeds=(0, 1, 2),
    )
    runs = plan.runs()
    assert len(runs) == 12 and len({run.name for run in runs}) == 12
    assert runs[0].name == "three_eight_divergence=alpha-0.3_s0=10_seed=0"
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert runs[1].candidate.label == "kl (s0 1, variational)"
    assert Run("van gogh", "", Candidate("mse"), 0).name == "van-gogh_nothing_divergence=mse_s0=1_seed=0"


def test_what_cannot_be_compared_is_refused() -> None:
    for name in ("pairs", "candidates", "seeds"):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            comparison(**{name: ()})
    with pytest.raises(ValueError, match="candidates.*duplicate"):
        comparison(candidates=(Candidate("mse"), Candidate("mse")))
    with pytest.raises(ValueError, match="s0.*sigma"):
        comparison(candidates=(Candidate("mse", 1.0), Candidate("mse", 2.0)), base=EraseConfig(sigma=0.1))
    with pytest.raises(ValueError, match="s0.*> 0"):
        comparison(candidates=(Candidate("mse", -1.0),))
    with pytest.raises(ValueError, match="unknown divergence"):
        comparison(candidates=(Candidate("helinger"),))
    with pytest.raises(ValueError, match="two runs"):
        comparison(pairs=(("a b", "c"), ("a?b", "c")))
    with pytest.raises(ValueError, match="images_per_class.*>= 2.*1"):
        comparison(drawing=Drawing(images_per_class=1))
    with pytest.raises(ValueError, match="images_of_target.*>= 2"):
        comparison(drawing=Drawing(images_of_target=1))


def test_settings_are_those_of_the_candidate_and_batches_are_shared_where_that_changes_nothing() -> None:
    plan = comparison(base=EraseConfig(max_train_steps=30, gradient_accumulation_steps=2, divergence="kl", seed=9))
    (run,) = plan.runs()[:1]
    config = plan.config(run)
    assert (config.divergence, config.s0, config.seed, config.frozen_batches) == ("mse", 1.0, 0, 60)
    for kept in (
        EraseConfig(timestep_sampling="importance"),
        EraseConfig(objective="noise", preservation_weight=0.0),
        EraseConfig(max_train_steps=300),
        EraseConfig(variational=True),
    ):
        candidates = (Candidate("kl"),)
        assert comparison(base=kept, candidates=candidates).config(Run("a", "b", candidates[0], 0)).frozen_batches == 0
    assert comparison(base=EraseConfig(frozen_batches=5)).config(run).frozen_batches == 5


def test_a_runs_identity_is_all_but_where_its_files_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")

    def identity(**changes: Any) -> dict[str, Any]:
        plan = comparison(**changes)
        return identity_of(plan, plan.runs()[0])

    assert identity() == identity(base=EraseConfig(training_cache="elsewhere"))
    assert identity() != identity(base=EraseConfig(learning_rate=1.0))
    assert identity() != identity(drawing=Drawing(num_inference_steps=7))
    assert identity()["settings"]["divergence"] == "mse" and identity()["target"] == "three"


def test_a_record_says_all(made: Path) -> None:
    records = Records(made / RUNS).found
    record = records["three_eight_divergence=mse_s0=10_seed=0"]
    assert record["identity"]["settings"]["preservation_prompts"] == digest(list(digits.preserved("three")))
    assert record["device"].startswith("cpu") and record["versions"].keys() >= {"torch", "fdu"}
    assert record["core_seconds"] > 0
    assert record["sigma"] > 0 and len(record["distance"].split()) == 3
    roles = [(one["role"], len(one["hits"]), len(one["change"].split())) for one in record["judged"]]
    assert roles == [("target", 2, 2), ("unseen", 2, 2)] + [("retained", 2, 2)] * 9 + [("cross_domain", 2, 2)] * 4
    asked = [one["attributes"] for one in record["judged"][:2]]
    assert [list(one) for one in asked] == [["ink"], ["ink"]]
    # The first prompt names no ink, the second black.
    assert all(re.fullmatch("-[01]", one["ink"]) for one in asked)
    assert not any("attributes" in one for one in record["judged"][2:])
    before = records["before_three"]
    assert len(before["judged"]) == 15 and before["judged"][0]["change"] is None
    assert len(records) == 3


def test_a_few_images_of_the_first_seed_are_stored_with_their_prompts(made: Path, tmp_path: Path) -> None:
    named = ["before_three", *(run.name for run in PLAN.runs())]
    assert {path.name for path in (made / "images").iterdir()} == {f"{name}.png" for name in named}
    pictured = Records(made / RUNS).found["before_three"]["pictured"]
    assert [name for name, _ in pictured] == ["three", "three", "zero", "one"]
    assert [prompt for _, prompt in pictured] == ["three", "three in black ink", "zero", "one"]
    (cached,) = (made / "cache").glob("before-*")
    before = load_file(cached)
    for path in (made / "images").iterdir():
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
        assert pixels.shape == (3, 32, 4 * 32)
        if path.stem == "before_three":
            kept = torch.cat([*before["0"], before["2"][0], before["3"][0]], dim=2).float()
            torch.testing.assert_close(pixels, kept, rtol=0, atol=0.003)
    more = dataclasses.replace(PLAN, seeds=(4, 0))
    folders = {job.name: cast(functools.partial[Record], job.make).args[-1] for job in jobs(more, tmp_path, tmp_path)}
    assert [name for name, folder in folders.items() if folder is None] == [
        run.name for run in more.runs() if not run.seed
    ]
    assert all(cast(functools.partial[Record], job.make).args[-1] is None for job in jobs(more, tmp_path))


def test_images_higher_than_a_picture_are_reduced() -> None:
    assert runs_file._strip([torch.rand(1, 3, 512, 256), torch.rand(2, 3, 512, 256)]).shape == (128, 3 * 64, 3)


def test_a_run_trains_what_fdu_erase_trains(made: Path, pipeline: StableDiffusionPipeline) -> None:
    """The second run of a process, with latents and frozen outputs from the cache."""
    run = PLAN.runs()[1]
    target, anchor = digits.concepts("three", "eight")
    settings = {**QUICK, **run.candidate.settings, "preservation_prompts": digits.preserved("three")}
    result = fdu.erase(pipeline, target, anchor, **settings, frozen_batches=QUICK["max_train_steps"])
    record = Records(made / RUNS).found[run.name]
    assert record["distance"] == " ".join(f"{value:.4g}" for value in result.history["distance"])
    assert record["sigma"] == result.sigma
    kinds = [path.name.split("-")[0] for path in (made / "cache").iterdir()]
    assert sorted(kinds) == ["before", "frozen", "latents", "prompts"]


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
    assert [record_of(records, more, run) is not None for run in more.runs()] == [True, True, False]
    redrawn = dataclasses.replace(PLAN, drawing=Drawing(num_inference_steps=3))
    assert all(record_of(records, redrawn, run) is None for run in redrawn.runs())


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
    assert [record_of(Records(tmp_path / RUNS), PLAN, run) is not None for run in PLAN.runs()] == [True, False]

    def lost(*given: Any, **named: Any) -> None:
        raise NotFinite("the loss became nan at step 1; the pipeline draws as before")

    monkeypatch.setattr(runs_file, "erase", lost)
    told: list[str] = []
    make_runs(PLAN, tmp_path / RUNS, made / "cache", tell=told.append)
    assert told == ["1/1 three_eight_divergence=pearson_chi2_s0=10_seed=0"]
    results = read_results(PLAN, Records(tmp_path / RUNS))
    assert results.failed == {PLAN.runs()[1].name: "the loss became nan at step 1"}
    assert [one.candidate for one in results.standings] == [Candidate("mse", 10.0)]
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
    # A damaged entry is made anew.
    kept.write_bytes(kept.read_bytes()[:-1] + b"\xff")
    records = Records(tmp_path / RUNS)
    del records.found[run.name]
    records.write(jobs(PLAN, tmp_path))
    make_runs(PLAN, tmp_path / RUNS, tmp_path / "cache", tell=told.append)
    assert len(told) == 2 and kept.read_bytes() == true.read_bytes()
    assert Records(tmp_path / RUNS).found[run.name]["judged"] == first["judged"]


@pytest.mark.slow
def test_processes_make_what_one_makes(made: Path, tmp_path: Path) -> None:
    make_runs(PLAN, tmp_path / RUNS, tmp_path / "cache", workers=2, tell=lambda line: None)
    one, several = (Records(folder / RUNS).found for folder in (made, tmp_path))
    for records in (one, several):
        for record in records.values():
            assert record.pop("device").endswith("1 thread")
            record.pop("seconds", None)
            record.pop("core_seconds", None)
    assert one == several


def test_results_tell_what_is_missing(made: Path) -> None:
    more = dataclasses.replace(PLAN, seeds=(0, 1))
    results = read_results(more, Records(made / RUNS))
    assert results.missing == 2 and results.sample.seeds == 1
    with pytest.raises(ValueError, match="0 of 2 records"):
        read_results(dataclasses.replace(PLAN, seeds=(5,)), Records(made / RUNS))


def test_records_without_attributes_are_read(made: Path, tmp_path: Path) -> None:
    """Those of an earlier version: the other figures stand, and no column for attributes."""
    results = read_results(PLAN, Records(made / RUNS))
    assert all(0 <= one.attributes.value <= 1 for one in results.standings)
    assert 0 <= results.before["three"][2] <= 1

    def older(name: str, record: dict[str, Any]) -> None:
        for one in record["judged"]:
            one.pop("attributes", None)

    former = read_results(PLAN, Records(changed(made, tmp_path, older)))
    assert former.missing == 0 and all(math.isnan(one.attributes.value) for one in former.standings)
    assert [one.erased for one in former.standings] == [one.erased for one in results.standings]
    assert "attributes" in table(results.standings) and "attributes" not in table(former.standings)
    write_page(tmp_path, former, "balanced")
    assert "ttributes" not in Page((tmp_path / "comparison.html").read_text()).text


def test_the_page_has_a_column_of_what_else_was_asked(tmp_path: Path) -> None:
    figures = {"mse": (0.6, 1.0, 0.02, 0.85), "kl": (0.9, 1.0, 0.01, 0.45)}
    results = results_of(figures, attributes=0.95)
    write_page(tmp_path, results, "balanced")
    text = Page((tmp_path / "comparison.html").read_text()).text
    assert "erased retained attributes change" in text and "before, three 0.0 99.0 95.0" in text
    assert re.search(r"mse \(s0 1\) 60\.0 \([^)]*\) 100\.0 \([^)]*\) 85\.0 \(", text)
    head, _, first, _ = (tmp_path / "comparison.md").read_text().splitlines()
    assert head == "| candidate | erased | retained | attributes | change of other classes | on the front |"
    assert re.match(r"\| kl .*\| 90\.0 .*\| 100\.0 .*\| 45\.0 ", first)
    (kl,) = [one for one in describe(results)["candidates"] if one["divergence"] == "kl"]
    assert kl["attributes"]["value"] == pytest.approx(0.45)


def test_records_of_several_places_are_told(made: Path, tmp_path: Path) -> None:
    assert read_results(PLAN, Records(made / RUNS)).mixed == ()

    def elsewhere(name: str, record: dict[str, Any]) -> None:
        if "pearson" in name:
            record["device"] = "cuda: another"
            record["versions"]["torch"] = "0.1"
            del record["versions"]["peft"]

    results = read_results(PLAN, Records(changed(made, tmp_path, elsewhere)))
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

    for found in read_results(PLAN, Records(changed(made, tmp_path, unseen))).recommendations.values():
        assert not found.usable and "'three'" in found.headline and "0 %" in found.headline


def test_the_page_stands_alone_and_says_what_was_found(tmp_path: Path) -> None:
    figures = {"mse": (0.6, 1.0, 0.02), "squared_hellinger": (0.9, 1.0, 0.01), "alpha:1.5": (0.5, 0.9, 0.03)}
    results = results_of(figures, failed={"a run": "the loss became nan"}, missing=3)
    alike = {"kl": "mse", "reverse_kl": "mse", "alpha:-0.5": "alpha:1.5"}
    write_page(
        tmp_path, results, "balanced", alike, "fdu compare <all>", ["fdu erase it", "fdu judge it"], ["Read <this>."]
    )
    text = (tmp_path / "comparison.html").read_text()
    page = Page(text)
    assert not page.open and not page.all("script") and "url(" not in text
    assert not any(name in attributes for _, attributes in page.elements for name in ("src", "href"))
    for part in (
        results.recommendations["balanced"].headline,
        "90.0 (",
        "kl, reverse_kl",
        "3 runs",
        "a run: the loss became nan",
        "fdu compare <all>",
        "fdu erase it fdu judge it",
        "Read <this>.",
        "By alpha, s0 1",
    ):
        assert part in page.text, part
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"comparison.html", "comparison.md", "front.svg", "change.svg", "alpha-s0-1.svg"}
    for path in tmp_path.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    rows = (tmp_path / "comparison.md").read_text().splitlines()
    assert len(rows) == 5 and rows[2].startswith("| squared_hellinger (s0 1) | 90.0 (") and "| yes (" in rows[2]
    described = describe(results)
    assert described["recommendations"]["erasure"]["settings"] == {"divergence": "squared_hellinger", "s0": 1.0}
    json.dumps(described)


def stored(folder: Path, results: Results, erased: dict[str, int]) -> None:
    """Pictures of one colour each: red 0 before, and by divergence."""
    names = {"before_three": 0, **{Run("three", "eight", Candidate(name), 0).name: red for name, red in erased.items()}}
    (folder / "images").mkdir(exist_ok=True)
    for name, red in names.items():
        Image.new("RGB", (3 * 8, 8), (red, 0, 0)).save(folder / "images" / f"{name}.png")


PICTURED = {"three": [("three", "a three"), ("three", "<the> three"), ("eight", "an eight")]}


def test_pictures_along_the_front_go_from_the_most_retained_to_the_most_erased(tmp_path: Path) -> None:
    figures = {"le_cam": (0.9, 0.6), "kl": (0.5, 0.5), "mse": (0.6, 1.0), "squared_hellinger": (0.8, 0.7)}
    results = dataclasses.replace(results_of(figures), pictured=PICTURED)
    stored(tmp_path, results, {"le_cam": 40, "mse": 20, "squared_hellinger": 30})
    recommended = results.recommendations["balanced"].candidate
    (rows,) = galleries(tmp_path, results, recommended).values()
    assert [row.name.split()[0] for row in rows] == ["before", "mse", "squared_hellinger", "le_cam"]
    assert [row.tiles[0].image.getpixel((4, 4)) for row in rows] == [(red, 0, 0) for red in (0, 20, 30, 40)]
    assert [(tile.name, tile.prompt) for tile in rows[0].tiles] == PICTURED["three"]
    assert [tile.seen for tile in rows[0].tiles] == [None] * 3
    # The judge of mse saw the target in the first 16 of 40 images, and eight in all.
    assert [tile.seen for tile in rows[1].tiles] == [True, True, True]
    dominated = galleries(tmp_path, results, Candidate("kl"))["three"]
    assert [row.name.split()[0] for row in dominated] == ["before", "kl", "mse", "squared_hellinger", "le_cam"]
    write_page(tmp_path, results, "balanced")
    page = Page((tmp_path / "comparison.html").read_text())
    assert not page.open and len(page.all("img")) == 12
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    assert "mse (s0 1), for the prompt '<the> three'; the judge saw three" in str(page.all("img")[4]["alt"])
    assert [one.get("class") for one in page.all("figure") if one.get("tabindex") == "0"] == ["tile"] * 12
    picture = Image.open(tmp_path / "front.png").convert("RGB")
    assert picture.height == 34 + 4 * 68 + 4
    assert [picture.getpixel((270, 34 + 68 * row + 30)) for row in range(4)] == [(red, 0, 0) for red in (0, 20, 30, 40)]


def test_a_row_without_its_pictures_has_none_and_a_page_without_any_no_section(tmp_path: Path) -> None:
    figures = {"le_cam": (0.9, 0.6), "mse": (0.6, 1.0), "squared_hellinger": (0.8, 0.7)}
    results = dataclasses.replace(results_of(figures), pictured=PICTURED)
    stored(tmp_path, results, {"le_cam": 40, "mse": 20})
    write_page(tmp_path, results, "balanced")
    page = Page((tmp_path / "comparison.html").read_text())
    assert len(page.all("img")) == 9 and "squared_hellinger (s0 1) erased 80 %, retained 70 % No pictures" in page.text
    for path in (tmp_path / "images").iterdir():
        path.write_text("no picture")
    write_page(tmp_path, results, "balanced")
    page = Page((tmp_path / "comparison.html").read_text())
    assert not page.all("img") and "Pictures along" not in page.text and not (tmp_path / "front.png").exists()


@pytest.mark.usefixtures("no_erasure")
def test_a_comparison_of_an_earlier_version_goes_on_without_pictures(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path / "out", ignore=shutil.ignore_patterns("images"))
    monkeypatch.chdir(tmp_path)

    def earlier(name: str, record: dict[str, Any]) -> None:
        record.pop("pictured", None)

    assert "Pictures along" in (made / "comparison.html").read_text() and (made / "front.png").is_file()
    changed(made, tmp_path / "out", earlier)
    assert main(PLANNED) == cli.OK
    assert "Pictures along" not in Path("out/comparison.html").read_text() and not Path("out/front.png").exists()


def test_alphas_are_found_under_every_name() -> None:
    standings = results_of({"mse": (0.6, 1.0), "squared_hellinger": (0.9, 1.0), "alpha:1.5": (0.5, 0.9)}).standings
    alike = {"kl": "mse", "reverse_kl": "mse", "alpha:-0.5": "alpha:1.5", "alpha:0.5": "squared_hellinger"}
    (points,) = alphas(standings, alike).values()
    assert [(alpha, one.candidate.divergence) for alpha, one in points] == [
        (-0.5, "alpha:1.5"), (0.0, "mse"), (0.5, "squared_hellinger"), (1.0, "mse"), (1.5, "alpha:1.5"),
    ]  # fmt: skip


def test_charts_put_points_where_they_belong() -> None:
    results = results_of({"mse": (0.25, 1.0), "kl": (0.75, 0.5), "le_cam": (0.2, 0.4)})
    root = ElementTree.fromstring(front_chart(results.standings).svg())
    circles = [one for one in root.iter() if one.tag.endswith("circle")]
    places = {(float(one.get("cx", 0)), float(one.get("cy", 0))): one.get("fill") for one in circles}
    (first, second, third) = list(places)
    assert first[0] < second[0] and first[1] < second[1]  # further right, and lower
    assert places[first] != "none" and places[second] != "none" and places[third] == "none"  # dominated, so hollow
    assert "mse (s0 1); kl (s0 1)" in str(root.get("aria-label"))
    curve = Curve("left & right", [(20, results.standings[0].erased), (80, results.standings[1].erased)], COLOURS[0])
    label = ElementTree.fromstring(curve_chart([curve], "steps", "share (%)").svg(whole=True)).get("aria-label")
    assert "left & right: 20: 25.0 % (" in str(label)


def test_one_candidate_makes_a_page_without_the_charts_of_a_former_page(tmp_path: Path) -> None:
    alphas = results_of({"alpha:1.5": (0.5, 0.9), "alpha:0.3": (0.6, 0.9), "alpha:0.1": (0.7, 0.9)})
    write_page(tmp_path, alphas, "balanced")
    assert (tmp_path / "alpha-s0-1.svg").is_file()
    (tmp_path / "mine.svg").write_text("kept")
    results = results_of({"mse": (0.5, 1.0)})
    write_page(tmp_path, results, "erasure", command="fdu compare x")
    page = (tmp_path / "comparison.html").read_text()
    assert results.recommendations["erasure"].headline in page
    assert "<pre><span>fdu</span> <span>compare</span> <span>x</span></pre>" in page
    assert table(results.standings).count("\n") == 3
    files = {"comparison.html", "comparison.md", "front.svg", "change.svg", "mine.svg"}
    assert {path.name for path in tmp_path.iterdir()} == files


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
    content = json.loads((folder / RECORD).read_text())
    content["common"]["settings"]["guidance_scale"] = content["common"]["settings"].pop("sampling_guidance")
    (folder / RECORD).write_text(json.dumps(content))
    check_folder(folder, PLAN)  # also if an earlier version wrote it, with former names of settings
    other = dataclasses.replace(PLAN, base=dataclasses.replace(PLAN.base, sampling_guidance=6.0))
    with pytest.raises(FileExistsError, match="sampling_guidance 3.0, not 6.0"):
        check_folder(folder, other)
    with pytest.raises(FileExistsError, match="pairs"):
        check_folder(folder, dataclasses.replace(PLAN, pairs=(("red", "blue"),)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="'thesis.tex'.*no comparison.json"):
        check_folder(tmp_path / "full", PLAN)


def test_the_command(
    command: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, output = command
    assert re.search("kl .*same .*mse", output)
    assert "3/3 three_eight_divergence=pearson_chi2_s0=10_seed=0" in output
    assert {path.name for path in made.iterdir()} >= {"comparison.html", "comparison.md", "comparison.json", RUNS}
    record = json.loads((made / "comparison.json").read_text())
    assert len(record["results"]["candidates"]) == 2 and record["command"].startswith("fdu compare digits")
    shutil.copytree(made, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs_file, "erase", None)  # all is there
    monkeypatch.setattr("fdu.comparison.recommendation.DRAWN_BEFORE", 0.0)
    for hardly, recommended in ((0.0, True), (1.1, False)):
        monkeypatch.setattr("fdu.comparison.recommendation.HARDLY", hardly)
        assert main([*PLANNED, "--prefer", "erasure"]) == cli.OK
        page, output = Path("out/comparison.html").read_text(), capsys.readouterr().out
        assert ("The recommended erasure" in page) == recommended and ("Nothing to recommend" in output) == (
            not recommended
        )
        command_line = "fdu erase digits --target three --anchor eight .*--divergence"
        assert bool(re.search(command_line, output)) == recommended


@pytest.mark.usefixtures("no_erasure")
def test_runs_in_the_format_of_an_earlier_version_are_announced(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path / "out")
    (tmp_path / "out" / RUNS).unlink()
    (tmp_path / "out" / "runs").mkdir()
    for name in ("three", "before_three"):
        (tmp_path / "out" / "runs" / f"{name}.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="an erasure was made"):
        main(PLANNED)
    assert re.search(r"1 run\b.* cannot read.* again", capsys.readouterr().out)


def test_the_erasure_to_make_is_the_one_that_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the parser of fdu erase, and compared with the settings of the run."""
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    Path("base/model_index.json").write_text("{}")
    words = ["compare", "base", "--target", "monet's", "--anchor", "", "--out", "out", "--concept_type", "style"]
    words += ["--dtype=bfloat16", "--mixed_precision=bf16", "--device=cpu", "--learning_rate=0.000123456789"]
    compare = parse([*words, "--preservation_prompts", "a cat", "two dogs", "--gradient_checkpointing"])
    assert isinstance(compare, Compare)
    base, candidate = compare.settings.checked(), Candidate("alpha:0.3", 1.23456789)
    line = shlex.split(compare._erase_command(base, candidate))
    erase = parse(line[1:])
    assert isinstance(erase, Erase)
    assert (erase.model, erase.target, erase.anchor) == ("base", ("monet's",), ("",))
    assert (erase.concept_type, erase.dtype, erase.device) == (("style",), "bfloat16", "cpu")
    assert erase.settings.checked() == dataclasses.replace(base, **candidate.settings)


@pytest.mark.parametrize("dtype", [[], ["--dtype=float32"]])
def test_the_evaluation_to_make_is_drawn_and_judged_like_the_comparison(dtype: list[str]) -> None:
    """Read by the parser of fdu evaluate, and compared with what the comparison draws."""
    words = ["compare", "org/model", *COMPARE[2:], "--prompts", "a set.txt", "--judge", "org/clip", "--device=cpu"]
    words += ["--images_per_class=7", "--judged_inference_steps=9", "--judged_guidance_scale=2.5"]
    compare = parse([*words, "--mixed_precision=bf16", *dtype])
    assert isinstance(compare, Compare)
    evaluate = parse(shlex.split(compare._evaluate_command())[1:])
    assert isinstance(evaluate, Evaluate)
    assert (evaluate.base, evaluate.erased, str(evaluate.out)) == ("org/model", "erased", "judged")
    assert (evaluate.prompts, evaluate.judge, evaluate.device) == ("a set.txt", "org/clip", "cpu")
    assert evaluate.dtype == ("auto" if dtype else "bfloat16")  # auto is float32
    assert evaluate.images_per_class == 7
    assert evaluate._sampling(subject_of("org/model")).settings() == compare._draw_settings()
    drawing = Drawing(**compare._draw_settings())
    assert drawing.judged_seed == evaluate.seed + JUDGED_SEED


def test_the_evaluation_to_make_names_no_defaults_but_the_device() -> None:
    compare = parse([*COMPARE, "--images_per_class=32", "--device=cpu"])
    assert isinstance(compare, Compare)
    line = compare._evaluate_command()
    assert line == "fdu evaluate digits erased --device cpu --out judged"
    evaluate = parse(shlex.split(line)[1:])
    assert isinstance(evaluate, Evaluate)
    assert evaluate._sampling(subject_of("digits")).settings() == compare._draw_settings()


@pytest.mark.slow
def test_other_models_are_judged_by_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    digits.load_pipeline().save_pretrained("base")  # a pipeline like any other
    save_clip(Path("clip"), WORDS)
    Path("set.txt").write_text(CONCEPTS)
    given = ["compare", "base", *COMPARE[2:], "--judge=clip", "--prompts=set.txt", "--judged_guidance_scale=3", *SMALL]
    assert main(given) == cli.OK
    assert "2/2 three_eight_divergence=mse_s0=1_seed=0" in capsys.readouterr().out
    (record,) = (record for name, record in Records(Path("out") / RUNS).found.items() if name.startswith("three_"))
    roles = [(one["role"], one["name"]) for one in record["judged"]]
    assert roles == [("target", "three"), ("unseen", "three")] + [
        ("retained", name) for name in ("two", "eight", "zero", "ink")
    ]
    assert record["identity"]["judge"] == "clip" and record["identity"]["concept_set"]
    monkeypatch.setattr(runs_file, "erase", None)
    assert main(given) == cli.OK  # all is there
    Path("set.txt").write_text(CONCEPTS.replace("a scan of", "a drawing of"))
    assert main(given) == cli.FAILED  # runs are to be made anew, which this test forbids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--divergences": "--judge", "mse,kl": "org/clip"}, "judge.*digits"),
        ({"--divergences": "--prompts", "mse,kl": "monet"}, "prompts.*digits"),
        ({"digits": "org/model", "--divergences": "--prompts", "mse,kl": "monet"}, "'monet'"),
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
    assert "--learning_rate" in shown and "--alpha" in shown and "fdu compare digits" in shown
    for name in ("--divergence ", "--seed ", "--training_cache", "--checkpoint_dir", "--resume_from_checkpoint"):
        assert name not in shown, name
