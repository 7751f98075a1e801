"""The study: how it judges claims, and that its page says what hand-made records say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import study
from judged_runs import runs

from fdu.comparison import runs as runs_file
from fdu.comparison.front import Estimate, Judged, Sample
from fdu.comparison.plan import Candidate
from fdu.comparison.runs import identity_of
from fdu.comparison.sweep import Records

IMAGES = 40


@pytest.fixture(autouse=True)
def small_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """36 runs with exact divergences, 18 for the games; nothing is loaded to tell whose records these are."""
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")
    monkeypatch.setattr(study, "PAIRS", study.PAIRS[:1])
    monkeypatch.setattr(study, "S0", (1.0, 10.0))
    monkeypatch.setattr(study, "STEPS", (20,))


def judged(erased: float, retained: float, change: float) -> list[dict[str, Any]]:
    def one(role: str, share: float) -> dict[str, Any]:
        hits = tuple(index < round(share * IMAGES) for index in range(IMAGES))
        return Judged(role, role, hits, (change,) * IMAGES).as_dict()

    return [one("target", 1 - erased), one("retained", retained)]


def page_of(
    folder: Path, figures: Callable[[Candidate], tuple[float, float, float]], runs: Sequence[int] = (36, 18)
) -> str | None:
    """The page of the first runs of both comparisons, with these figures; None if none is written."""
    records = Records(folder / "study.jsonl")
    for comparison, most in zip(study.comparisons(), runs, strict=True):
        for run in comparison.runs()[:most]:
            records.found[run.name] = {
                "identity": identity_of(comparison, run),
                "judged": judged(*figures(run.candidate)),
                "sigma": 0.1,
                "seconds": 4.0,
                "core_seconds": 36.0,
                "device": "cpu: AVX512, 1 thread",
                "versions": {"fdu": "0", "torch": "9.9"},
            }
    records.write([])
    study.write_page(folder, folder / "docs")
    path = folder / "docs" / "results.md"
    return path.read_text() if path.exists() else None


def verdicts(page: str) -> dict[str, str]:
    """What the page says of each claim."""
    table = page.split("## Which claims hold here")[1].split("\n\n")[1]
    return dict(line.strip("| ").split(" | ") for line in table.splitlines()[2:])


def as_the_paper_says(candidate: Candidate) -> tuple[float, float, float]:
    """Hellinger erases and keeps more than mse; variational ones erase more and hurt more."""
    if candidate.divergence == "squared_hellinger" and not candidate.others:
        return 0.9, 1.0, 0.01
    if dict(candidate.others).get("variational"):
        return 0.8, 0.7, 0.03
    return 0.5, 0.8, 0.02


@pytest.mark.parametrize(
    ("bears", "wanted"),
    [
        ((1, 1), "holds (2 "),
        ((-1, 0, 0), "does not hold (1 "),
        ((0, 0), "not observed (2 "),
        ((1, 0), "holds in part (1 "),
        ((1, -1, 0), "mixed (1 "),
        ((None, 1, None), "holds (1 "),
        ((None, None), "cannot be told (2 "),
        ((), "not measured yet"),
    ],
)
def test_verdicts_are_those_of_the_intervals(bears: tuple[int | None, ...], wanted: str) -> None:
    verdict = study.verdict(bears)
    assert verdict.startswith(wanted)
    assert sum(map(int, re.findall(r"\d+", verdict))) == len(bears)


def test_what_keeps_more_counts_only_where_it_does_not_erase_less() -> None:
    flat = Estimate(0.0, -1.0, 1.0)
    up, down = Estimate(1.0, 0.5, 1.5), Estimate(-1.0, -1.5, -0.5)
    for erased in (flat, up):
        assert study.kept_sign({"erased": erased, "retained": up, "change": flat}) == 1
    for erased in (flat, down):
        assert study.kept_sign({"erased": erased, "retained": down, "change": flat}) == -1
    assert study.kept_sign({"erased": down, "retained": up, "change": flat}) is None
    assert study.kept_sign({"erased": up, "retained": flat, "change": up}) is None
    found, candidates = runs({"squared_hellinger": (0.9, 1.0, 0.05), "mse": (0.5, 1.0, 0.01)})
    (traded,) = study.dominance(Sample(found, candidates))
    assert traded.bears is None  # more is erased, but more is changed
    undecided = study.Contrast("here", dict.fromkeys(study.MORE_OF, flat), None)
    assert study.judged([undecided])["table"].endswith(f"| {study.WORDS[None]} |")
    assert study.kept_sign({"erased": flat, "retained": up, "change": up}) == 1
    assert study.kept_sign({"erased": flat, "retained": flat, "change": down}) == 1
    assert study.kept_sign({"erased": flat, "retained": flat, "change": up}) == -1
    assert study.kept_sign({"erased": flat, "retained": flat, "change": flat}) == 0


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
        ("three", candidate, seed): tuple(map(Judged.from_dict, judged(share, 1.0, 0.01)))
        for candidate, share in zip(candidates, shares, strict=True)
        for seed in range(3)
    }
    (contrast,) = study.scale_decides(Sample(found, candidates))
    assert contrast.bears == wanted
    assert contrast.differences["erased"].value == pytest.approx(gaps[1] - gaps[0], abs=0.03)


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    page = page_of(tmp_path, as_the_paper_says)
    assert page is not None and "(all 54 runs;" in page and "AVX512, 1 thread; torch 9.9." in page
    found = verdicts(page)
    assert found["Hellinger dominates MSE"].startswith("holds (2 ")
    assert found["Hellinger keeps retained concepts best"].startswith("holds (10 ")
    assert found["A larger gradient erases faster"].startswith("does not hold (2 ")
    assert found["The scale sigma decides whether the divergence matters"].startswith("not observed (1 ")
    assert found["Variational losses erase faster"].startswith("holds (3 ")
    assert found["Variational losses hurt fidelity more"].startswith("cannot be told (3 ")
    recommended = [line for line in page.splitlines() if line.startswith("* **")]
    assert len(recommended) == 3 and any("squared_hellinger" in line for line in recommended)
    assert {path.name for path in (tmp_path / "docs" / "results").iterdir()} == {"front.svg", "variational.svg"}


def test_the_page_is_not_fooled_by_records_that_say_the_opposite(tmp_path: Path) -> None:
    page = page_of(
        tmp_path,
        lambda one: (0.3, 0.7, 0.05) if one.divergence == "squared_hellinger" else (0.6, 0.9, 0.01),
        runs=(36, 0),
    )
    assert page is not None and "(36 of 54 runs;" in page
    found = verdicts(page)
    assert found["Hellinger dominates MSE"].startswith("does not hold (2 ")
    assert found["Hellinger keeps retained concepts best"].startswith("does not hold (10 ")
    assert list(found.values()).count("not measured yet") == 2


def test_a_study_that_is_not_finished_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page_of(tmp_path, as_the_paper_says, runs=(5, 0)) is None
    assert "nothing to compare yet" in capsys.readouterr().out
    assert "(15 of 54 runs;" in (page_of(tmp_path, as_the_paper_says, runs=(15, 0)) or "")
