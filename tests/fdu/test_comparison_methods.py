"""Comparisons of methods and of robust erasures, and what holds of each under attack."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from fdu import cli
from fdu.cli import main
from fdu.cli.compare import Compare
from fdu.cli.program import parse
from fdu.comparison import runs as runs_file
from fdu.comparison.front import ATTACKED, Judged, Sample
from fdu.comparison.page import table
from fdu.comparison.plan import Candidate, Comparison
from fdu.comparison.recommendation import preferences, recommend
from fdu.comparison.results import RUNS
from fdu.comparison.runs import identity_of
from fdu.comparison.sweep import Records
from fdu.config import EraseConfig
from fdu.evaluation.robustness import AttackConfig

QUICK = {"max_train_steps": 4, "train_batch_size": 2, "num_latents": 4, "num_inference_steps": 2, "rank": 4}
COMPARE = ["compare", "digits", "--target", "three", "--anchor", "eight", "--out", "out"]
SMALL = ["--seeds=1", "--images_per_class=2", "--judged_inference_steps=1", "--workers=1"]
SMALL += [f"--{name}={value}" for name, value in QUICK.items()]
FAST = AttackConfig(steps=2, batch_size=2, restarts=2, looks=1)
COMPUTED = Candidate("squared_hellinger", others=(("train_method", "closed_form"),))


def candidates(*words: str) -> tuple[Candidate, ...]:
    """What the command compares."""
    compare = parse([*COMPARE, *words])
    assert isinstance(compare, Compare)
    return compare._candidates(["mse", "squared_hellinger"])


def test_methods_and_rounds_are_combined_and_what_does_not_train_is_one_candidate() -> None:
    found = candidates("--methods", "closed_form,lora", "--robust", "0,2", "--s0", "1", "10")
    assert [one.label for one in found[:3]] == [
        "closed_form, adversarial_rounds 0",
        "closed_form, adversarial_rounds 2",
        "mse (s0 1, train_method lora, adversarial_rounds 0)",
    ]
    assert len(found) == 2 + 2 * 2 * 2
    assert [one.others for one in candidates()] == [()] * 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "lora,lorra"], "methods must be one of"),
        (["--robust", "0,some"], "robust must be whole numbers"),
        (["--train_method", "closed_form"], "--methods closed_form,lora"),
        (["--robust", "9", "--max_train_steps", "4"], "adversarial_rounds 9 needs at least 18 steps"),
        (["--methods", "lora", "--train_method", "full"], "train_method has no effect beside --methods"),
        (["--robust", "0,1", "--adversarial_rounds", "1"], "adversarial_rounds has no effect beside --robust"),
        (["--methods", "closed_form", "--s0", "2"], "has no divergence; leave out"),
    ],
)
def test_others_are_refused(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, *words]) == cli.USAGE
    assert told in capsys.readouterr().err and not Path("out").exists()


def test_settings_of_the_training_do_not_reach_what_does_not_train() -> None:
    base = EraseConfig(**QUICK, preservation_weight=4.0)
    comparison = Comparison("digits", (("three", "eight"),), (COMPUTED, Candidate("mse")), base=base)
    computed, trained = map(comparison.config, comparison.runs()[:2])
    assert (computed.train_method, computed.preservation_weight, computed.rank) == ("closed_form", 4.0, 16)
    assert trained.rank == 4 and trained.frozen_batches == 4
    robust = dataclasses.replace(COMPUTED, others=(*COMPUTED.others, ("adversarial_rounds", 2)))
    comparison = Comparison("digits", (("three", "eight"),), (robust,), base=base)
    assert comparison.config(comparison.runs()[0]).num_latents == 4


def test_batches_are_not_drawn_before_searches_that_add_to_them() -> None:
    base = EraseConfig(max_train_steps=8, adversarial_rounds=1)
    for order, frozen in (("search_first", 8), ("alternate", 0)):
        own = dataclasses.replace(base, adversarial_order=order)
        comparison = Comparison("digits", (("three", "eight"),), (Candidate("mse"),), base=own)
        assert comparison.config(comparison.runs()[0]).frozen_batches == frozen


def test_an_attack_is_part_of_the_identity_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Comparison("digits", (("three", "eight"),), (Candidate("mse"),))
    attacked = dataclasses.replace(plain, attacked=True)
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")
    (run,) = [run for run in plain.runs() if run.seed == 0]
    assert (
        "attack" not in identity_of(plain, run)
        and identity_of(attacked, run)["attack"]["steps"] == runs_file.ATTACK.steps
    )
    assert plain.conditions() == attacked.conditions()


def test_what_holds_is_a_figure_of_its_own() -> None:
    def judged(erased: float, held: float | None) -> tuple[Judged, ...]:
        def hits(share: float) -> tuple[bool, ...]:
            return tuple(index < round(40 * share) for index in range(40))

        found = (Judged("target", "three", hits(1 - erased)), Judged("retained", "eight", hits(1.0)))
        return found if held is None else (*found, Judged(ATTACKED, "three", hits(1 - held)))

    one, other = Candidate("mse"), COMPUTED
    shares = {one: 0.2, other: 0.9}
    runs = {("three", each, seed): judged(1.0, held) for each, held in shares.items() for seed in range(3)}
    sample = Sample(runs, [one, other])
    assert [round(sample.estimate("held", each).value, 2) for each in (one, other)] == [0.2, 0.9]
    assert sample.estimate("retained", one).value == 1.0 and sample.difference("held", other, one).sign == 1
    assert "| held |" in table(sample.standings()) and "closed_form |" in table(sample.standings())
    # Both erase the same without an attack, so only robustness tells them apart.
    held = recommend(sample, "robustness")
    assert held.candidate == other and held.certain and "under attack, in 90 %" in held.sentences[0]
    assert not recommend(sample, "balanced").certain
    weak = Sample({key: seen for key, seen in runs.items() if key[1] == one}, [one])
    assert "erased only 20 % under attack" in recommend(weak, "robustness").headline
    plain = Sample({key: judged(1.0, None) for key in runs}, [one, other])
    assert preferences(plain) == [prefer for prefer in preferences(sample) if prefer != "robustness"]
    assert math.isnan(plain.estimate("held", one).value) and "held" not in table(plain.standings())


def test_a_comparison_of_methods_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs_file, "ATTACK", FAST)
    monkeypatch.setattr(runs_file, "ATTACK_LATENTS", 2)
    monkeypatch.chdir(tmp_path)
    words = ["--divergences", "mse", "--methods", "closed_form,lora", "--robust", "0,1", "--adversarial_steps", "2"]
    assert main([*COMPARE, *words, *SMALL]) == cli.OK
    told = capsys.readouterr().out
    assert "closed_form, adversarial_rounds 1" in told and "| held |" in told
    assert {path.name for path in Path("out").glob("*.svg")} >= {"held.svg", "front.svg"}
    page = Path("out/comparison.html").read_text()
    assert "Erased against what holds under attack" in page and "even under an attack" in page
    records = Records(Path("out") / RUNS)
    assert all(
        record["judged"][-1]["role"] == ATTACKED for name, record in records.found.items() if "before" not in name
    )
    again = next(line for line in told.splitlines() if line.startswith("to run it: "))
    command = parse(again.removeprefix("to run it: fdu ").split())
    command.prepare("")  # type: ignore[attr-defined]


def test_settings_of_the_closed_form_are_those_of_its_candidates() -> None:
    found = candidates("--methods", "closed_form,lora", "--ridge", "0.01")
    assert dict(found[0].others) == {"train_method": "closed_form", "ridge": 0.01}
    assert dict(found[1].others) == {"train_method": "lora"}
    compare = parse([*COMPARE, "--methods", "closed_form,lora", "--ridge", "0.01", "--sigma", "0.3", "--s0", "5"])
    compare.prepare("")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "method", "wanted", "unwanted"),
    [
        (["--methods", "cross_attention", "--learning_rate", "0.004"], "cross_attention", "--learning_rate 0.004", "x"),
        (["--methods", "cross_attention"], "cross_attention", "--train_method cross_attention", "--learning_rate"),
        (["--methods", "closed_form,lora"], "closed_form", "--dtype float32", "--divergence"),
    ],
)
def test_the_command_is_that_of_the_run(words: list[str], method: str, wanted: str, unwanted: str) -> None:
    compare = parse([*COMPARE, *words])
    assert isinstance(compare, Compare)
    (chosen, *_) = [one for one in compare._candidates(["mse"]) if dict(one.others)["train_method"] == method]
    line = compare._erase_command(compare._base(), chosen)
    assert wanted in line and unwanted not in line
