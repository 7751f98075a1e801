"""The study: how it judges claims, and that its page says what hand-made records say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import claims
import experiment
import pytest
import study
from experiment import Suite
from handmade import CONDITIONS, Seen, write_records
from judged_runs import judged, runs

from fdu.comparison import runs as runs_file
from fdu.comparison.front import Estimate, Sample
from fdu.comparison.plan import Candidate, Run
from fdu.comparison.sweep import Records


@pytest.fixture(autouse=True)
def small_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target per pipeline, two values of s0, games of one length; no model is loaded for the identities."""
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")
    monkeypatch.setattr(study, "PAIRS", {model: pairs[:1] for model, pairs in study.PAIRS.items()})
    monkeypatch.setattr(study, "S0", (1.0, 10.0))
    monkeypatch.setattr(study, "STEPS", (20,))


def page_of(folder: Path, figures: Callable[[Suite, Run], Seen | None]) -> str | None:
    """The page of records with these figures; None if none is written."""
    suites = [suite for model in study.PAIRS for suite in study.suites(model).values()]
    write_records(folder / "study.jsonl", suites, figures)
    study.write_page(folder, folder / "docs")
    path = folder / "docs" / "results.md"
    return path.read_text() if path.exists() else None


def verdicts(page: str) -> dict[str, list[str]]:
    """What the page says of each claim: of the emoji, of the digits, and whether they agree."""
    table = page.split("## Which claims hold")[1].split("\n\n")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return {claim: [*rest, ""][:3] for claim, *rest in rows}


def as_the_paper_says(suite: Suite, run: Run) -> Seen:
    """Hellinger erases and keeps more than mse; variational ones erase more and hurt more."""
    if run.candidate.divergence == "squared_hellinger" and suite.name.partition("-")[2] != "games":
        return Seen(0.9, 1.0, 0.01)
    if dict(run.candidate.others).get("variational"):
        return Seen(0.8, 0.7, 0.03)
    return Seen(0.5, 0.8, 0.02)


@pytest.mark.parametrize(
    ("bears", "wanted"),
    [
        ((1, 1), "holds (2 "),
        ((-1, 0), "does not hold (1 "),
        ((0, 0), "not observed (2 "),
        ((1, 0), "holds in part (1 "),
        ((1, 0, 0), "mostly not observed (1 "),
        ((-1, 0, 0), "mostly not observed (1 "),
        ((-1, -1, 0, 0, 0), "does not hold (2 "),
        ((1, 1, 0, 0, 0), "mostly not observed (2 "),
        ((claims.TRADE, 1), "mixed (1 "),
        ((claims.TRADE, 0), "does not hold (1 "),
        ((1, -1, 0), "mixed (1 "),
        ((None, 1, None), "holds (1 "),
        ((None, None), "cannot be told (2 "),
        ((), "not measured yet"),
    ],
)
def test_verdicts_are_those_of_the_intervals(bears: tuple[int | None, ...], wanted: str) -> None:
    verdict = claims.verdict(bears)
    assert verdict.startswith(wanted)
    assert sum(map(int, re.findall(r"\d+", verdict))) == len(bears)


def test_what_keeps_more_counts_only_where_it_does_not_erase_less() -> None:
    flat = Estimate(0.0, -1.0, 1.0)
    up, down = Estimate(1.0, 0.5, 1.5), Estimate(-1.0, -1.5, -0.5)
    for erased in (flat, up):
        assert claims.kept_sign({"erased": erased, "retained": up, "change": flat}) == 1
    for erased in (flat, down):
        assert claims.kept_sign({"erased": erased, "retained": down, "change": flat}) == -1
    assert claims.kept_sign({"erased": down, "retained": up, "change": flat}) is None
    assert claims.kept_sign({"erased": up, "retained": flat, "change": up}) is None
    found, candidates = runs({"squared_hellinger": (0.9, 1.0, 0.05), "mse": (0.5, 1.0, 0.01)})
    (traded,) = claims.dominance(Sample(found, candidates))
    assert traded.bears == claims.TRADE  # more is erased, but more is changed
    undecided = claims.Contrast("here", dict.fromkeys(claims.MORE_OF, flat), None)
    assert claims.told([undecided]).endswith(f"| {claims.WORDS[None]} |")
    assert claims.kept_sign({"erased": flat, "retained": up, "change": up}) == 1
    assert claims.kept_sign({"erased": flat, "retained": flat, "change": down}) == 1
    assert claims.kept_sign({"erased": flat, "retained": flat, "change": up}) == -1
    assert claims.kept_sign({"erased": flat, "retained": flat, "change": flat}) == 0


@pytest.mark.parametrize(
    ("shares", "wanted"), [((1.0, 1.0), None), ((0.0, 0.0), None), ((0.5, 0.5), 0), ((1.0, 0.5), 1)]
)
def test_runs_that_erased_all_or_nothing_say_nothing_about_speed(
    shares: tuple[float, float], wanted: int | None
) -> None:
    found, candidates = runs({"mse": (shares[0], 1.0, 0.05), "squared_hellinger": (shares[1], 1.0, 0.05)})
    (contrast,) = claims.larger_gradient(Sample(found, candidates))
    assert contrast.bears == wanted


@pytest.mark.parametrize(
    ("gaps", "wanted"),
    [
        ((0.1, 0.4), 1),
        ((0.4, 0.1), -1),
        ((-0.1, -0.4), 1),
        ((-0.4, -0.1), -1),
        ((0.3, 0.3), 0),
        ((-0.3, 0.3), 0),
    ],
)
def test_the_scale_decides_only_where_the_difference_grows(gaps: tuple[float, float], wanted: int) -> None:
    """Also where it turns round: as large as before is not larger."""
    candidates = [Candidate(name, s0) for s0 in (1.0, 10.0) for name in ("squared_hellinger", "pearson_chi2")]
    shares = [0.5 + side * gap / 2 for gap in gaps for side in (1, -1)]
    found = {
        ("three", candidate, seed): judged(share, 1.0)
        for candidate, share in zip(candidates, shares, strict=True)
        for seed in range(3)
    }
    (contrast,) = claims.scale_decides(Sample(found, candidates))
    assert contrast.bears == wanted
    assert contrast.differences["erased"].value == pytest.approx(gaps[1] - gaps[0], abs=0.03)


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    page = page_of(tmp_path, as_the_paper_says)
    assert page is not None and "(all 135 runs;" in page and "AVX512, 1 thread; torch 9.9." in page
    found = verdicts(page)
    emoji, digits, same = found["Hellinger dominates MSE"]
    assert emoji.startswith("holds (3 ") and digits.startswith("holds (2 ") and same == "yes"
    assert found["Hellinger keeps retained concepts best"][0].startswith("holds (18 ")
    assert found["A larger gradient erases faster"][0].startswith("does not hold (2 ")
    assert found["The scale sigma decides whether the divergence matters"][0].startswith("not observed (1 ")
    assert found["Variational losses erase faster"][0].startswith("holds (3 ")
    assert found["Variational losses hurt fidelity more"][0].startswith("cannot be told (3 ")
    assert found["Variational losses hurt fidelity more"][2] == ""
    recommended = [line for line in page.splitlines() if line.startswith("* **")]
    assert len(recommended) == 3 and any("squared_hellinger" in line for line in recommended)
    shown = [line for line in page.splitlines() if line.startswith(("| short | squared", "| whole | squared"))]
    assert len(shown) == 2 and all("| 90.0 (" in line for line in shown)
    charts = {"alpha.svg", "front.svg", "variational.svg"}
    assert {path.name for path in (tmp_path / "docs" / "results").iterdir()} == charts


def test_pipelines_that_disagree_are_named(tmp_path: Path) -> None:
    def figures(suite: Suite, run: Run) -> Seen:
        better = run.candidate.divergence == "squared_hellinger"
        if suite.name.startswith("digits"):
            better = not better
        return Seen(0.6, 0.9, 0.01) if better else Seen(0.3, 0.7, 0.05)

    page = page_of(tmp_path, figures)
    assert page is not None
    emoji, digits, same = verdicts(page)["Hellinger dominates MSE"]
    assert emoji.startswith("holds (3 ") and digits.startswith("does not hold (2 ") and same == "no"
    assert verdicts(page)["Hellinger keeps retained concepts best"][1].startswith("does not hold (10 ")


def test_a_study_that_is_not_finished_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def short(seeds: int) -> Callable[[Suite, Run], Seen | None]:
        return lambda suite, run: Seen(0.5) if suite.name == "emoji-short" and run.seed < seeds else None

    assert page_of(tmp_path / "none", short(0)) is None
    assert "nothing to compare yet" in capsys.readouterr().out
    page = page_of(tmp_path / "one", short(1)) or ""
    assert "(15 of 135 runs;" in page and "1 of 3 pairs of target and seed" in page
    assert page.count(study.NOT_MEASURED) == 4 and "Recommendations" not in page and "variational.svg" not in page
    assert verdicts(page)["Variational losses erase faster"][2] == ""


def test_outdated_records_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, as_the_paper_says) or ""
    assert "(all 135 runs;" in page and "pairs of target and seed" not in page
    losses = experiment.losses
    monkeypatch.setattr(experiment, "losses", lambda name: ["corrected"] if name == "kl" else losses(name))
    study.write_page(tmp_path, tmp_path / "docs")  # every game of kl is outdated, so no seed of the games is complete
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "(123 of 135 runs;" in page
    assert [one[0] for one in verdicts(page).values()].count("not measured yet") == 2


def test_a_candidate_that_failed_is_left_out_and_named(tmp_path: Path) -> None:
    suites = [suite for model in study.PAIRS for suite in study.suites(model).values()]
    write_records(tmp_path / "study.jsonl", suites, as_the_paper_says)
    records = Records(tmp_path / "study.jsonl")
    (name,) = [
        name for name in records.found if name.startswith("emoji-short/") and "pearson_chi2_s0=10_seed=0" in name
    ]
    records.found[name] = {**{key: records.found[name][key] for key in ("identity", *CONDITIONS)}, "failed": "loss nan"}
    records.write([])
    study.write_page(tmp_path, tmp_path / "docs")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "(134 of 135 runs;" in page and f"{name} (loss nan)" in page
    assert page.count("| s0 10, pearson_chi2 minus mse |") == 1  # of the digits
    assert verdicts(page)["The scale sigma decides whether the divergence matters"][0] == "not measured yet"
