"""The study: what it measures, how it judges claims, and that its page says what hand-made records say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import study
import study_claims
from judged_runs import runs

from fdu.comparison import runs as runs_file
from fdu.comparison.front import Estimate, Judged, Sample
from fdu.comparison.plan import Candidate
from fdu.comparison.runs import identity_of, jobs
from fdu.comparison.sweep import Records

IMAGES = 40


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded to tell whose records these are."""
    monkeypatch.setattr(runs_file, "weights", lambda *model: "0123456789abcdef")


def judged(erased: float, retained: float, change: float) -> list[dict[str, Any]]:
    def one(role: str, share: float) -> dict[str, Any]:
        hits = tuple(index < round(share * IMAGES) for index in range(IMAGES))
        return Judged(role, role, hits, (change,) * IMAGES).as_dict()

    return [one("target", 1 - erased), one("retained", retained)]


def write_records(
    name: str,
    folder: Path,
    figures: Callable[[Candidate], tuple[float, float, float]],
    most: int | None = None,
) -> None:
    comparison = study.comparisons()[name]
    records = Records(folder / f"{name}.jsonl")
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
    records.write(jobs(comparison, folder))


def as_the_paper_says(candidate: Candidate) -> tuple[float, float, float]:
    """Hellinger erases and keeps more than mse; variational ones erase more and hurt more."""
    if candidate.divergence == "squared_hellinger" and not candidate.others:
        return 0.9, 1.0, 0.01
    if dict(candidate.others).get("variational"):
        return 0.8, 0.7, 0.03
    return 0.5, 0.8, 0.02


def test_the_study_is_what_was_asked_for() -> None:
    main = study.comparisons()[study.MAIN]
    assert len(main.runs()) == 3 * 6 * 3 * 3
    assert {target for target, _ in main.pairs} == {"three", "seven", "red"}
    assert all(one.s0 in study.S0 for one in main.candidates) and main.base.sigma == "auto"
    games = study.comparisons()[study.GAMES]
    settings = [dict(one.others) for one in games.candidates]
    assert (
        sum("variational" in one for one in settings)
        == len(settings) / 2
        == len(study.GAME_DIVERGENCES) * len(study.STEPS)
    )
    names = [run.name for suite in study.comparisons().values() for run in suite.runs()]
    assert len(set(names)) == len(names) == 162 + 54


def test_verdicts_are_those_of_the_intervals() -> None:
    def verdict(*bears: int | None) -> str:
        return study_claims.verdict(bears)

    assert verdict(1, 1) == "holds: in all 2 comparisons"
    assert verdict(-1, -1) == "does not hold: the opposite in all 2 comparisons"
    assert verdict(0, 0) == "not seen: none of 2 comparisons differs by more than chance explains"
    assert verdict(1, 0) == "holds in part: in 1 of 2 comparisons, undecided in 1"
    assert verdict(-1, 0, 0) == "does not hold: the opposite in 1 of 3 comparisons, undecided in 2"
    assert verdict(1, -1, 0) == "mixed: holds in 1 of 3 comparisons, the opposite in 1, undecided in 1"
    assert verdict() == "not measured yet"
    assert (
        verdict(None, 1, None)
        == "holds: in all 1 comparisons; 2 more say nothing, since the candidate that retains more also erases less"
    )
    assert verdict(None, None) == "cannot be told: in all 2 comparisons the candidate that retains more erases less"


def test_what_keeps_more_counts_only_where_it_does_not_erase_less() -> None:
    flat = Estimate(0.0, -1.0, 1.0)
    up, down = Estimate(1.0, 0.5, 1.5), Estimate(-1.0, -1.5, -0.5)
    for erased in (flat, up):
        assert study_claims.kept_sign({"erased": erased, "retained": up, "change": flat}) == 1
    for erased in (flat, down):
        assert study_claims.kept_sign({"erased": erased, "retained": down, "change": flat}) == -1
    assert study_claims.kept_sign({"erased": down, "retained": up, "change": flat}) is None
    assert study_claims.kept_sign({"erased": up, "retained": flat, "change": up}) is None
    found, candidates = runs({"squared_hellinger": (0.9, 1.0, 0.05), "mse": (0.5, 1.0, 0.01)})
    (traded,) = study_claims.dominance(Sample(found, candidates))
    assert traded.bears is None  # more is erased, but more is changed
    undecided = study_claims.Contrast("here", dict.fromkeys(study_claims.DIGITS, flat), None)
    assert study_claims.judged([undecided])["table"].endswith("| what keeps more erases less |")
    assert study_claims.kept_sign({"erased": flat, "retained": up, "change": up}) == 1
    assert study_claims.kept_sign({"erased": flat, "retained": flat, "change": down}) == 1
    assert study_claims.kept_sign({"erased": flat, "retained": flat, "change": up}) == -1
    assert study_claims.kept_sign({"erased": flat, "retained": flat, "change": flat}) == 0


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
    (contrast,) = study_claims.scale_decides(Sample(found, candidates))
    assert contrast.bears == wanted
    assert contrast.differences["erased"].value == pytest.approx(gaps[1] - gaps[0], abs=0.03)


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    for name in study.comparisons():
        write_records(name, tmp_path / "records", as_the_paper_says)
    study.write_page(tmp_path / "records", tmp_path / "docs")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "(all 216 runs;" in page and "cpu: AVX512, 1 thread; torch 9.9." in page
    for row in (
        "| Hellinger dominates MSE | holds: in all 3 comparisons |",
        "| Hellinger keeps retained concepts best | holds: in all 15 comparisons |",
        "| A larger gradient erases faster | does not hold: the opposite in 3 of 6 comparisons, undecided in 3 |",
        "| The scale sigma decides whether the divergence matters | not seen: none of 2 comparisons differs by more",
        "| Variational losses erase faster | holds: in all 9 comparisons |",
        "| Variational losses hurt fidelity more | cannot be told: in all 9 comparisons the candidate "
        "that retains more erases less |",
    ):
        assert row in page, row
    recommended = [line for line in page.splitlines() if line.startswith("* **")]
    assert len(recommended) == 3 and any("squared_hellinger" in line for line in recommended)
    assert {path.name for path in (tmp_path / "docs" / "results").iterdir()} == {
        "front.svg",
        "change.svg",
        "variational.svg",
    }


def test_the_page_is_not_fooled_by_records_that_say_the_opposite(tmp_path: Path) -> None:
    write_records(
        study.MAIN,
        tmp_path / "records",
        lambda one: (0.3, 0.7, 0.05) if one.divergence == "squared_hellinger" else (0.6, 0.9, 0.01),
    )
    study.write_page(tmp_path / "records", tmp_path)
    page = (tmp_path / "results.md").read_text()
    assert "| Hellinger dominates MSE | does not hold: the opposite in all 3 comparisons |" in page
    assert "| Hellinger keeps retained concepts best | does not hold: the opposite in all 15 comparisons |" in page
    assert "(162 of 216 runs;" in page and page.count("not measured yet |") == 2


def test_a_study_that_is_not_finished_says_so(tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "results.md"
    write_records(study.MAIN, tmp_path / "few", as_the_paper_says, most=5)
    study.write_page(tmp_path / "few", tmp_path)
    assert not page.exists() and "nothing to compare yet" in capsys.readouterr().out
    write_records(study.MAIN, tmp_path / "some", as_the_paper_says, most=40)
    study.write_page(tmp_path / "some", tmp_path)
    assert "(40 of 216 runs;" in page.read_text() and "So far 2 of 9 pairs of target and seed" in page.read_text()
