"""The recommendation of a comparison: who wins for what one prefers, and that nobody does where chance would do."""

from __future__ import annotations

import re
import statistics

import numpy as np
import pytest
from judged_runs import judged, runs

from fdu.comparison.front import Sample
from fdu.comparison.judged import Judged
from fdu.comparison.plan import Candidate
from fdu.comparison.recommendation import BETA, Recommendation, f_measure, recommend


def chosen(figures: dict[str, tuple[float, ...]], prefer: str = "balanced", **how: int) -> Recommendation:
    return recommend(Sample(*runs(figures, **how)), prefer)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefer", BETA)
def test_the_score_is_the_weighted_harmonic_mean(prefer: str) -> None:
    beta = BETA[prefer]  # type: ignore[index]
    erased, retained = np.array([0.3, 0.9, 0.0, 0.0]), np.array([0.8, 0.5, 1.0, 0.0])
    wanted = [
        statistics.harmonic_mean(pair, weights=[1, beta**2])
        for pair in zip(erased.tolist(), retained.tolist(), strict=True)
    ]
    assert f_measure(erased, retained, beta) == pytest.approx(wanted)


def test_a_clear_winner_is_claimed() -> None:
    found = chosen({"mse": (0.5, 1.0), "kl": (0.95, 1.0), "le_cam": (0.6, 0.95)})
    assert found.candidate.divergence == "kl" and found.certain and not found.alike
    assert "kl (s0 1)" in found.headline and "mse" not in found.headline
    assert re.search(r"kl \(s0 1\).*95 %.*100 %", found.sentences[0])
    assert re.search(r"le_cam \(s0 1\).* 1 other", found.sentences[-1])


def test_no_winner_is_claimed_where_intervals_overlap() -> None:
    found = chosen({"mse": (0.775, 1.0, 0.01), "kl": (0.8, 1.0, 0.01)}, seeds=1)
    # One image of forty apart, and the same change.
    sample = Sample(*runs({"mse": (0.775, 1.0, 0.01), "kl": (0.8, 1.0, 0.01)}, seeds=1))
    assert sample.difference("erased", Candidate("kl"), Candidate("mse")).sign == 0
    assert not found.certain and len(found.alike) == 1
    assert found.headline.startswith("No winner") and "2" in found.headline and "kl (s0 1)" in found.headline
    assert re.search(r"kl \(s0 1\).*mse \(s0 1\)", found.sentences[-1])


def test_of_those_alike_the_one_that_changes_least_is_taken() -> None:
    figures = {"mse": (0.775, 1.0, 0.01), "kl": (0.8, 1.0, 0.03), "le_cam": (0.5, 1.0, 0.001)}
    found = chosen(figures, seeds=1)
    assert found.candidate.divergence == "mse" and found.certain
    assert [one.divergence for one in found.alike] == ["kl"]
    assert re.search(r"mse \(s0 1\).*1\.01 %.*2\.00 points", " ".join(found.sentences))
    # What erases less changes less, which is no merit if erasure is preferred.
    eager = chosen(figures, "erasure", seeds=1)
    assert eager.candidate.divergence == "kl" and not eager.certain
    assert re.search(r"kl \(s0 1\).*mse \(s0 1\)", eager.headline)


def test_doing_nothing_and_destroying_everything_never_win() -> None:
    figures = {"mse": (0.0, 1.0), "kl": (1.0, 0.0), "le_cam": (0.7, 0.7)}
    for prefer in BETA:
        assert chosen(figures, prefer).candidate.divergence == "le_cam"


def test_the_preference_decides_between_erasing_and_retaining() -> None:
    figures = {"mse": (0.65, 1.0), "kl": (1.0, 0.65)}
    assert chosen(figures, "preservation").candidate.divergence == "mse"
    assert chosen(figures, "erasure").candidate.divergence == "kl"
    assert re.search("retaining.*twice.*erasing", chosen(figures, "preservation").sentences[1])
    assert re.search("erasing.*twice.*retaining", chosen(figures, "erasure").sentences[1])
    with pytest.raises(ValueError, match="prefer.*preservation, balanced, erasure.*'speed'"):
        chosen(figures, "speed")


def test_nothing_is_recommended_where_nothing_was_erased() -> None:
    found = chosen({"mse": (0.1, 1.0), "kl": (0.3, 1.0)})
    assert not found.certain and not found.usable
    assert "kl (s0 1)" in found.headline and "30 %" in found.headline
    assert any("max_train_steps" in sentence for sentence in found.sentences)
    idle = chosen({"mse": (0.0, 1.0, 0.001), "kl": (0.0, 1.0, 0.002)})
    assert not idle.certain and not idle.usable


def test_one_seed_and_one_candidate_are_told() -> None:
    found, candidates = {("three", Candidate("mse"), 0): judged(0.9, 1.0)}, [Candidate("mse")]
    one = recommend(Sample(found, candidates), "balanced")
    assert "mse (s0 1)" in one.headline and not one.certain
    assert any("seed" in sentence for sentence in one.sentences)
    assert not any("seed" in sentence for sentence in chosen({"mse": (0.9, 1.0)}).sentences)


def test_nothing_is_recommended_for_a_target_that_was_hardly_drawn_before() -> None:
    """Doing nothing "erases" 72 % of it."""
    sample = Sample(*runs({"mse": (0.725, 1.0, 0.0), "kl": (0.725, 1.0, 0.02)}))
    assert recommend(sample, "balanced").usable
    assert recommend(sample, "balanced", {"three": 0.9}).certain
    for prefer in BETA:
        found = recommend(sample, prefer, {"three": 0.275, "red": 0.9})
        assert not found.certain and not found.usable
        assert "'three'" in found.headline and "28 %" in found.headline and "red" not in found.headline


def test_of_those_alike_none_is_taken_that_erased_less_than_half() -> None:
    """It changes least because it hardly erases."""
    figures = {"mse": (0.5, 1.0, 0.05), "kl": (0.475, 1.0, 0.01)}
    found = chosen(figures, seeds=1)
    assert found.candidate.divergence == "mse" and not found.certain
    assert found.headline.startswith("No winner") and "mse (s0 1)" in found.headline
    assert any("half" in sentence and "kl (s0 1)" in sentence for sentence in found.sentences)
    assert found.score.value == pytest.approx(2 * 0.5 / 1.5)
    # The other way round: the better score is that of the one that erased less than half.
    found = chosen({"mse": (0.475, 1.0), "kl": (0.525, 0.95)}, "preservation", seeds=1)
    assert found.candidate.divergence == "kl" and not found.certain
    third = chosen({**figures, "le_cam": (0.5, 1.0, 0.02)}, seeds=1)
    assert third.candidate.divergence == "le_cam" and not third.certain


def test_so_few_images_claim_no_winner() -> None:
    def few(shown: bool, images: int) -> tuple[Judged, ...]:
        return Judged("target", "three", (shown,) * images), Judged("retained", "eight", (True,) * 8, (0.01,) * 8)

    for images, certain in ((2, False), (5, False), (6, True)):
        candidates = [Candidate("mse"), Candidate("kl")]
        found = {("three", one, 0): few(one.divergence == "kl", images) for one in candidates}
        claimed = recommend(Sample(found, candidates), "balanced")
        assert claimed.candidate.divergence == "mse" and claimed.certain == certain
        assert ("few images" in claimed.headline) == (not certain)
        assert any("images_per_class" in sentence for sentence in claimed.sentences) == (not certain)
