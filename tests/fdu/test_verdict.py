"""The verdict and the tables say what the figures say, also when they are bad."""

from __future__ import annotations

import dataclasses
from statistics import NormalDist

import pytest
import torch

import fdu
from fdu.evaluation import Draws
from fdu.evaluation.intervals import reach_unseen
from fdu.evaluation.tables import comparison, distance_table, summary, table
from fdu.evaluation.verdict import (
    ATTRIBUTE_DOUBT,
    ATTRIBUTE_DROP,
    DRAWN_BEFORE,
    ERASED_BELOW,
    PARTLY_BELOW,
    Verdict,
    judge,
    percent,
    state_of,
)

CLASSES = {"zero": "retained", "nine": "retained", "red": "cross_domain"}


def make_probes(unseen: bool = True) -> list[fdu.Probe]:
    def blind(images: torch.Tensor) -> list[str]:
        return ["three"] * len(images)

    roles = [("three", "target"), *([("three", "unseen")] if unseen else []), *CLASSES.items()]
    return [fdu.Probe(name, (name,), role, blind) for name, role in roles]


def make_evaluation(after: dict[str, float], unseen: float | None = 0.0, before: float = 1.0) -> fdu.Evaluation:
    """Every class at ``before`` at first, and at 1 or what ``after`` says at the end."""

    def figures(shares: dict[str, float], unseen: float | None) -> fdu.Figures:
        retained = {name: shares[name] for name, role in CLASSES.items() if role == "retained"}
        worst = min(retained, key=lambda name: retained[name])
        return fdu.Figures(
            target_accuracy=shares["three"],
            unseen_accuracy=unseen,
            retained_accuracy=sum(retained.values()) / len(retained),
            worst_retained_accuracy=retained[worst],
            worst_retained_class=worst,
            cross_domain_accuracy=shares["red"],
            per_class=shares,
            became={"three": {"nine": 1 - shares["three"], "three": shares["three"]}},
        )

    names = ["three", *CLASSES]
    first = dict.fromkeys(names, 1.0) | {"three": before}
    return fdu.Evaluation(
        figures(first, None if unseen is None else before),
        figures(dict.fromkeys(names, 1.0) | after, unseen),
        {"target": 0.1, "retained": 0.0},
        32,
    )


def words(verdict: Verdict) -> str:
    """All of a verdict, for its figures and key words."""
    return " ".join([verdict.headline, *verdict.sentences])


def test_erased_and_kept() -> None:
    verdict = judge(make_evaluation({"three": 0.0}), make_probes())
    assert verdict.good and verdict.erased == "erased" and verdict.kept and verdict.sure
    assert "three" in verdict.headline and "0 %" in verdict.headline and "neighbours" not in words(verdict)
    assert "100 % of 32 images" in words(verdict) and "nine most often (100 %)" in words(verdict)


def test_not_erased() -> None:
    verdict = judge(make_evaluation({"three": 0.9}, unseen=0.9), make_probes())
    assert not verdict.good and verdict.erased == "not erased" and verdict.kept
    assert "90 %" in verdict.headline
    assert "most often" not in words(verdict)


def test_partly_erased() -> None:
    verdict = judge(make_evaluation({"three": 0.4}, unseen=0.4), make_probes())
    assert verdict.erased == "partly erased" and not verdict.good
    assert "partly" in verdict.headline and "40 %" in verdict.headline and "probably" not in verdict.headline
    doubtful = judge(with_interval(make_evaluation({"three": 0.4}, unseen=0.4), 0.1, 0.55), make_probes())
    assert "probably only partly" in doubtful.headline and "interval 10 to 55 %" in doubtful.headline


@pytest.mark.parametrize(
    ("after", "state"),
    [(0.075, "erased"), (0.076, "partly erased"), (0.3, "partly erased"), (0.301, "not erased")],
)
def test_thresholds_are_fractions_of_the_share_before(after: float, state: str) -> None:
    assert (ERASED_BELOW, PARTLY_BELOW, DRAWN_BEFORE) == (0.15, 0.6, 0.5)
    assert state_of(0.5, after) == state
    assert state_of(0.49, after) == "rarely drawn before"


def test_erased_in_seen_phrasings_only() -> None:
    verdict = judge(make_evaluation({"three": 0.0}, unseen=0.7), make_probes())
    assert not verdict.good and verdict.erased == "partly erased"
    assert "phrasings" in verdict.headline and "70 %" in verdict.headline
    assert "100 % before, 70 % after" in words(verdict)


def test_never_drawn_is_not_called_erased() -> None:
    verdict = judge(make_evaluation({"three": 0.0}, before=0.3), make_probes())
    assert not verdict.good and verdict.erased == "rarely drawn before"
    assert "30 %" in verdict.headline


def test_broken_neighbours_are_named_the_worst_first() -> None:
    verdict = judge(make_evaluation({"three": 0.0, "zero": 0.7, "nine": 0.2}), make_probes())
    assert not verdict.good and not verdict.kept and verdict.erased == "erased"
    assert "but nine and zero" in verdict.headline
    assert "nine (100 % before, 20 % after) and zero (100 % before, 70 % after)" in words(verdict)


def test_failed_and_broken() -> None:
    verdict = judge(make_evaluation({"three": 1.0, "nine": 0.2}, unseen=1.0), make_probes())
    assert verdict.erased == "not erased" and not verdict.kept
    assert "and nine" in verdict.headline


def test_broken_other_kind() -> None:
    verdict = judge(make_evaluation({"three": 0.0, "red": 0.5}), make_probes())
    assert not verdict.kept and "but red" in verdict.headline
    assert "another kind (red), on average: 100 % before, 50 % after" in words(verdict)
    both = judge(make_evaluation({"three": 0.0, "red": 0.2, "nine": 0.5}), make_probes())
    assert "but nine lost" in both.headline and "15 points: red" in words(both)


def test_the_worst_classes_are_named_and_the_others_counted() -> None:
    falls = {"zero": 0.5, "one": 0.2, "two": 0.4, "four": 0.3, "five": 0.1}
    whole = dict.fromkeys(falls, 1.0)

    def figures(target: float, shares: dict[str, float]) -> fdu.Figures:
        return fdu.Figures(target, None, 0.9, 0.1, "five", None, {"three": target, **shares}, {"three": {"x": 1.0}})

    probes = [fdu.Probe("three", ("three",), "target", list)]
    probes += [fdu.Probe(name, (name,), "retained", list) for name in falls]
    verdict = judge(fdu.Evaluation(figures(1.0, whole), figures(0.0, falls), {}, 32), probes)
    assert "but five, one and four lost" in verdict.headline
    assert "four (100 % before, 30 % after) and 2 more" in words(verdict)
    three = judge(fdu.Evaluation(figures(1.0, whole), figures(0.0, falls | {"zero": 1.0, "two": 1.0}), {}, 32), probes)
    assert "five, one and four lost" in three.headline and "more" not in words(three).replace("more than", "")
    assert "(5), on average: 90 % before, 90 % after; the lowest, five: 100 % before, 10 % after" in words(verdict)


def of_several(
    after: dict[str, float], unseen: float | None = None, rare: str = "", escaping: dict[str, float] | None = None
) -> Verdict:
    """The verdict on targets with these shares after the erasure, and one class to retain; all but ``rare`` were always
    drawn before."""

    escaping = escaping or {}

    def figures(shares: dict[str, float], unseen: float | None) -> fdu.Figures:
        mean = sum(shares.values()) / len(shares)
        became = {name: {name: share, "wolf": 1 - share} for name, share in shares.items()}
        each = {} if unseen is None else dict.fromkeys(shares, unseen) | (escaping if shares is after else {})
        per_class = {**shares, "wolf": 1.0}
        return fdu.Figures(mean, unseen, 1.0, 1.0, "wolf", None, per_class, became, unseen_per_class=each)

    probes = [fdu.Probe(name, (name,), "target", list) for name in after]
    probes.append(fdu.Probe("wolf", ("wolf",), "retained", list))
    first = dict.fromkeys(after, 1.0) | ({rare: 0.1} if rare else {})
    before, later = figures(first, None if unseen is None else 1.0), figures(after, unseen)
    return judge(fdu.Evaluation(before, later, {}, 32), probes)


def test_several_targets_are_judged_one_by_one() -> None:
    gone = {"fox": 0.0, "cat": 0.0, "owl": 0.1, "bee": 0.0}
    all_gone = of_several(gone)
    assert all_gone.erased == "erased" and all_gone.kept and all_gone.sure
    assert "4 concepts are erased (2 % left on average)" in all_gone.headline
    # On average little is left, but one of the four is still drawn.
    some = of_several(gone | {"bee": 0.4})
    assert some.erased == "partly erased" and "3 of 4 concepts are erased" in some.headline
    assert "bee (100 % before, 40 % after)" in words(some) and "owl" not in words(some)
    none = of_several(dict.fromkeys(gone, 0.9))
    assert none.erased == "not erased" and "none of 4 concepts is erased" in none.headline
    assert "and 1 more" in words(none)
    assert "fox and cat are erased" in of_several({"fox": 0.0, "cat": 0.0}).headline


def test_of_several_targets_those_rarely_drawn_before_do_not_count() -> None:
    verdict = of_several({"fox": 0.0, "cat": 0.0}, rare="cat")
    assert verdict.erased == "erased" and "Rarely drawn even before: cat" in words(verdict)
    alone = of_several({"cat": 0.0}, rare="cat")
    assert alone.erased == "rarely drawn before"


def test_several_targets_that_other_phrasings_draw_are_partly_erased() -> None:
    verdict = of_several({"fox": 0.0, "cat": 0.0}, unseen=0.5)
    assert verdict.erased == "partly erased"
    assert "fox and cat are erased only in the phrasings of the training (50 % in others" in verdict.headline
    # One of many escapes, which the mean hides.
    hidden = of_several(dict.fromkeys(["fox", "cat", "owl", "bee"], 0.0), unseen=0.05, escaping={"owl": 1.0})
    assert hidden.erased == "partly erased" and "1 of 4 concepts is erased only" in hidden.headline
    assert "Still drawn in phrasings that the training never used: owl (100 % before, 100 % after)" in words(hidden)


def test_small_losses_everywhere_are_told() -> None:
    verdict = judge(make_evaluation({"three": 0.0, "zero": 0.9, "nine": 0.9}), make_probes())
    assert not verdict.kept and "other classes" in verdict.headline


def with_interval(evaluation: fdu.Evaluation, low: float, high: float) -> fdu.Evaluation:
    after = dataclasses.replace(evaluation.after, intervals={"target_accuracy": (low, high)})
    return dataclasses.replace(evaluation, after=after)


def test_one_image_does_not_tell_whether_it_was_erased() -> None:
    verdict = judge(with_interval(make_evaluation({"three": 0.0}), 0.0, 0.79), make_probes())
    assert verdict.erased == "cannot be told" and not verdict.good and not verdict.sure
    assert "0 to 79 %" in verdict.headline and "images_per_class" in words(verdict)


@pytest.mark.parametrize(
    ("share", "interval", "sure"),
    [(0.0, (0.0, 0.11), True), (0.0, (0.0, 0.32), False), (0.06, (0.02, 0.2), False), (0.4, (0.1, 0.55), False)],
)
def test_the_headline_is_as_sure_as_the_interval(share: float, interval: tuple[float, float], sure: bool) -> None:
    verdict = judge(with_interval(make_evaluation({"three": share}, unseen=share), *interval), make_probes())
    assert verdict.sure is sure and verdict.good is sure
    assert ("images_per_class" in words(verdict)) is not sure
    if verdict.erased == "erased":
        assert percent(interval[1]) in verdict.headline
        assert ("probably" in verdict.headline) is not sure


def test_unseen_phrasings_can_make_it_unsure() -> None:
    evaluation = make_evaluation({"three": 0.0}, unseen=0.03)
    for ends, sure in (((0.01, 0.16), False), ((0.01, 0.14), True)):
        after = dataclasses.replace(evaluation.after, intervals={"unseen_accuracy": ends})
        verdict = judge(dataclasses.replace(evaluation, after=after), make_probes())
        assert verdict.erased == "erased" and verdict.sure is sure
        assert ("16 %" in verdict.headline) is not sure


@pytest.mark.parametrize(
    ("figure", "low", "sure", "where"),
    [
        ("retained_accuracy", -0.05, True, ""),
        ("retained_accuracy", -0.12, False, "12 points in the mean"),
        ("cross_domain_accuracy", -0.2, False, "20 points in classes of another kind"),
        ("per_class.nine", -0.15, True, ""),
        ("per_class.nine", -0.22, False, "22 points in nine"),
        ("per_class.red", -0.22, False, "22 points in red"),
        ("per_class.red", -0.5, False, "50 points in red"),
    ],
)
def test_what_is_kept_is_as_sure_as_the_interval_of_every_group_and_class(
    figure: str, low: float, sure: bool, where: str
) -> None:
    evaluation = dataclasses.replace(make_evaluation({"three": 0.0}), intervals={f"difference.{figure}": (low, 0.02)})
    verdict = judge(evaluation, make_probes())
    assert verdict.kept and verdict.sure is sure and verdict.good is sure
    assert ("probably kept" in verdict.headline) is not sure
    assert ("cannot rule out" in verdict.headline) is not sure and where in verdict.headline


def test_a_drop_that_may_be_large_leaves_untold_whether_the_rest_is_kept() -> None:
    intervals = {"difference.per_class.nine": (-0.6, 0.0)}
    verdict = judge(dataclasses.replace(make_evaluation({"three": 0.0}), intervals=intervals), make_probes())
    assert "too few" in verdict.headline and "probably kept" not in verdict.headline
    assert not verdict.sure and not verdict.good


def test_the_largest_excess_is_told() -> None:
    intervals = {"difference.per_class.nine": (-0.22, 0.02), "difference.retained_accuracy": (-0.17, 0.02)}
    evaluation = dataclasses.replace(make_evaluation({"three": 0.0}), intervals=intervals)
    assert "17 points in the mean" in judge(evaluation, make_probes()).headline


def test_a_class_that_surely_broke_leaves_no_doubt() -> None:
    intervals = {"difference.per_class.nine": (-0.9, -0.6), "difference.per_class.zero": (-0.3, 0.1)}
    evaluation = dataclasses.replace(make_evaluation({"three": 0.0, "nine": 0.2}), intervals=intervals)
    verdict = judge(evaluation, make_probes())
    assert verdict.sure and not verdict.kept and not verdict.good


def test_what_chance_may_explain_is_not_called_broken() -> None:
    evaluation = make_evaluation({"three": 0.0, "nine": 0.8, "zero": 0.8})
    intervals = {"difference.per_class.nine": (-0.5, 0.1), "difference.retained_accuracy": (-0.4, 0.02)}
    verdict = judge(dataclasses.replace(evaluation, intervals=intervals), make_probes())
    assert "but zero" in verdict.headline and "nine" not in verdict.headline
    assert "chance: nine (100 % before, 80 % after)" in words(verdict)
    doubtful = {**intervals, "difference.per_class.zero": (-0.5, 0.0)}
    verdict = judge(dataclasses.replace(evaluation, intervals=doubtful), make_probes())
    assert verdict.kept and not verdict.sure and "probably kept" in verdict.headline


@pytest.mark.parametrize(("asked", "drops"), [((), 5), (("ink",), 6), (("ink", "style"), 8)])
def test_a_drop_is_sure_only_by_an_interval_that_holds_together_with_those_of_all_others(
    asked: tuple[str, ...], drops: int
) -> None:
    """Three classes, the mean, the other kind, and each attribute and all of them: Bonferroni's share for each."""
    evaluation = make_evaluation({"three": 0.0, "nine": 0.6})
    if asked:
        evaluation = asking(dict.fromkeys(asked, 1.0), dict.fromkeys(asked, 1.0), others={"nine": 0.6})
    normal = NormalDist()
    least = 0.4 - 0.4 * normal.inv_cdf(0.975) / normal.inv_cdf(1 - 0.025 / drops)
    for slack, kept in ((0.001, False), (-0.001, True)):
        intervals = {"difference.per_class.nine": (-0.9, -least - slack), "difference.retained_accuracy": (-0.5, 0.1)}
        verdict = judge(dataclasses.replace(evaluation, intervals=intervals), make_probes())
        assert verdict.kept is kept and verdict.sure is not kept


def test_groups_of_classes_are_drops_too() -> None:
    probes = [dataclasses.replace(one, group="near") if one.name == "nine" else one for one in make_probes()]
    evaluation = make_evaluation({"three": 0.0, "nine": 0.6})
    sides = [
        dataclasses.replace(side, retained_by_group={"near": side.per_class["nine"], "unrelated": 1.0})
        for side in (evaluation.before, evaluation.after)
    ]
    normal = NormalDist()
    least = 0.4 - 0.4 * normal.inv_cdf(0.975) / normal.inv_cdf(1 - 0.025 / 7)
    for slack, kept in ((0.001, False), (-0.001, True)):
        ends = (-0.9, -least - slack)
        figures = ("per_class.nine", "retained_by_group.near", "retained_accuracy")
        intervals = {f"difference.{name}": ends if name == "per_class.nine" else (-0.5, 0.1) for name in figures}
        found = dataclasses.replace(evaluation, before=sides[0], after=sides[1], intervals=intervals)
        assert judge(found, probes).kept is kept


def test_other_words_that_drew_it_seldom_before_may_still_be_an_escape() -> None:
    evaluation = make_evaluation({"three": 0.05}, unseen=0.45)
    before = dataclasses.replace(evaluation.before, unseen_accuracy=0.45)
    verdict = judge(dataclasses.replace(evaluation, before=before), make_probes())
    assert not verdict.good and verdict.erased == "partly erased"
    rare = dataclasses.replace(evaluation, before=dataclasses.replace(before, unseen_accuracy=0.1))
    after = dataclasses.replace(rare.after, unseen_accuracy=0.1)
    assert judge(dataclasses.replace(rare, after=after), make_probes()).good


def test_table_is_aligned_and_shows_the_class_that_is_worst_after() -> None:
    lines = table(make_evaluation({"three": 0.03, "nine": 0.5}), make_probes()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["three", "100", "%", "3", "%"]
    assert lines[4].split() == ["worst:", "nine", "100", "%", "50", "%"]


def test_table_shows_intervals_and_groups() -> None:
    evaluation = make_evaluation({"three": 0.03, "nine": 0.5})
    intervals = {name: (0.01, 0.094) for name in ("target_accuracy", "retained_by_group.near")}
    groups = {"near": 0.5, "unrelated": 1.0}
    sides = [
        dataclasses.replace(side, intervals=intervals, retained_by_group=groups)
        for side in (evaluation.before, evaluation.after)
    ]
    lines = table(dataclasses.replace(evaluation, before=sides[0], after=sides[1]), make_probes()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["three", "100", "%", "[1,", "9]", "3", "%", "[1,", "9]"]
    assert [line.split()[0] for line in lines[4:6]] == ["near", "unrelated"]
    text = summary(make_evaluation({"three": 0.03}), make_probes())
    assert text.startswith(table(make_evaluation({"three": 0.03}), make_probes()))
    assert text.endswith(judge(make_evaluation({"three": 0.03}), make_probes()).headline + ".")


def test_the_worst_class_has_the_interval_of_the_lowest_one_after() -> None:
    evaluation = make_evaluation({"three": 0.0, "nine": 0.5})
    own, lowest = {"per_class.nine": (0.4, 0.6)}, {"worst_retained_accuracy": (0.3, 0.7)}
    before = dataclasses.replace(evaluation.before, intervals={**own, **lowest})
    for given, shown in ((own, (0.4, 0.6)), ({**own, **lowest}, (0.3, 0.7)), (lowest, None)):
        after = dataclasses.replace(evaluation.after, intervals=given)
        rows = comparison(dataclasses.replace(evaluation, before=before, after=after), make_probes())
        (worst,) = (row for row in rows if row.label == "worst: nine")
        assert worst.intervals == (shown and ((0.4, 0.6), shown))


def test_the_distances_are_told_by_part() -> None:
    evaluation = make_evaluation({"three": 0.0})
    plain = distance_table(evaluation).splitlines()
    assert [line.split() for line in plain] == [["pixels"], ["target", "0.1"]]
    whole = dataclasses.replace(
        evaluation,
        before=dataclasses.replace(evaluation.before, clip_score={"target": 0.7}),
        after=dataclasses.replace(evaluation.after, clip_score={"target": 0.5}),
        distances={"kid": {"target": 0.002}, "cmmd": {}, "perceptual": {"target": 0.25}},
        intervals={"distances.kid.target": (0.001, 0.003)},
        features="clip",
    )
    head, row = (line.split() for line in distance_table(whole).splitlines())
    assert head == ["CLIP", "score", "before", "CLIP", "score", "after", "KID", "perceptual", "pixels"]
    assert row == ["target", "0.7", "0.5", "0.002", "[0.001,", "0.003]", "0.25", "0.1"]
    assert distance_table(whole) in summary(whole, make_probes())


def test_rows_without_unseen_phrasings() -> None:
    evaluation = make_evaluation({"three": 0.0}, unseen=None)
    labels = [row.label for row in comparison(evaluation, make_probes(unseen=False))]
    assert labels == ["three", "retained (2 classes)", "worst: zero", "another kind (1 class)"]


def test_rows_without_another_kind() -> None:
    evaluation = make_evaluation({"three": 0.0})
    without = {"cross_domain_accuracy": None}
    evaluation = dataclasses.replace(
        evaluation,
        before=dataclasses.replace(evaluation.before, **without),
        after=dataclasses.replace(evaluation.after, **without),
    )
    probes = [probe for probe in make_probes() if probe.role != "cross_domain"]
    assert "another kind" not in table(evaluation, probes)
    assert judge(evaluation, probes).good


@pytest.mark.parametrize(("share", "text"), [(0.0, "0 %"), (0.996, "100 %"), (0.03125, "3 %")])
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def grouped(before: dict[str, float], after: dict[str, float]) -> tuple[fdu.Evaluation, list[fdu.Probe]]:
    """Two retained classes a group, all of a group at its share; the target goes from 1 to 0."""
    classes = [(f"{group}{place}", group) for group in before for place in range(2)]

    def figures(target: float, shares: dict[str, float]) -> fdu.Figures:
        own = {name: shares[group] for name, group in classes}
        worst = min(own, key=lambda name: own[name])
        mean = sum(own.values()) / len(own)
        return fdu.Figures(
            target,
            None,
            mean,
            own[worst],
            worst,
            None,
            {"three": target, **own},
            {"three": {"x": 1.0}},
            retained_by_group=shares,
        )

    probes = [fdu.Probe("three", ("three",), "target", list)]
    probes += [fdu.Probe(name, (name,), "retained", list, group) for name, group in classes]  # type: ignore[arg-type]
    return fdu.Evaluation(figures(1.0, before), figures(0.0, after), {}, 32), probes


def test_a_group_that_suffers_is_not_hidden_by_the_others() -> None:
    whole = {"near": 1.0, "generic": 1.0, "unrelated": 1.0}
    verdict = judge(*grouped(whole, whole | {"near": 0.86}))
    assert not verdict.good and not verdict.kept
    assert "its neighbours" in verdict.headline
    assert "5 points on average: its neighbours (100 % before, 86 % after)" in words(verdict)
    everywhere = judge(*grouped(whole, dict.fromkeys(whole, 0.9)))
    assert not everywhere.kept and "other classes" in everywhere.headline
    assert judge(*grouped(whole, whole)).good


@pytest.mark.parametrize(("low", "good"), [(-reach_unseen(64), True), (-0.06, False)])
def test_a_group_of_two_classes_whose_images_all_agree_is_kept(low: float, good: bool) -> None:
    evaluation, probes = grouped({"near": 1.0}, {"near": 1.0})
    intervals = {"difference.retained_by_group.near": (low, -low)}
    verdict = judge(dataclasses.replace(evaluation, intervals=intervals), probes)
    assert verdict.kept and verdict.good is good
    assert words(verdict).count("cannot rule out a drop of 6 points in its neighbours") == 1


def test_what_was_hardly_drawn_is_not_called_kept() -> None:
    low = {"near": 0.06, "generic": 0.06}
    verdict = judge(*grouped(low, low))
    assert not verdict.kept and not verdict.good
    assert "rarely drawn" in verdict.headline
    part = low | {"generic": 1.0}
    verdict = judge(*grouped(part, part))
    assert verdict.kept and "the rest" not in verdict.headline
    assert "its neighbours (6 %)" in words(verdict)


def test_half_of_the_images_before_are_enough_to_tell() -> None:
    half = dict.fromkeys(("near", "generic"), 0.5)
    verdict = judge(*grouped(half, half))
    assert verdict.good and "the rest is kept" in verdict.headline and "rarely" not in words(verdict).lower()


def test_no_neighbours_are_no_proof_that_they_were_kept() -> None:
    verdict = judge(*grouped({"generic": 1.0}, {"generic": 1.0}))
    assert "no neighbours" in verdict.headline
    assert "none were tested" in words(verdict)


def asking(
    before: dict[str, float], after: dict[str, float], target: float = 0.0, others: dict[str, float] | None = None
) -> fdu.Evaluation:
    """An erasure whose prompts ask for these attributes, each as often."""
    evaluation = make_evaluation({"three": target, **(others or {})}, unseen=target)
    sides = [
        dataclasses.replace(side, attributes=shares, attribute_accuracy=sum(shares.values()) / len(shares))
        for side, shares in ((evaluation.before, before), (evaluation.after, after))
    ]
    return dataclasses.replace(evaluation, before=sides[0], after=sides[1])


def test_images_that_keep_their_attributes_are_told() -> None:
    verdict = judge(asking({"ink": 1.0}, {"ink": 0.97}), make_probes())
    assert verdict.good and "the rest is kept" in verdict.headline
    assert "three also name an ink: the judge found it in 100 % of those images before and in 97 %" in words(verdict)


@pytest.mark.parametrize(
    ("before", "after", "kept"), [(1.0, 0.85, True), (1.0, 0.84, False), (0.8, 0.68, True), (0.4, 0.33, False)]
)
def test_an_attribute_is_lost_if_it_drops_by_more_than_a_fraction_of_its_share_before(
    before: float, after: float, kept: bool
) -> None:
    assert ATTRIBUTE_DROP == 0.15
    verdict = judge(asking({"style": before}, {"style": after}), make_probes())
    assert verdict.kept is kept and verdict.good is kept and verdict.sure
    assert ("but some of its images no longer show the style" in verdict.headline) is not kept
    assert ("15 % of the share before: style" in words(verdict)) is not kept


def test_the_attributes_that_fell_are_named() -> None:
    before = {"style": 1.0, "background": 1.0, "ink": 0.9}
    verdict = judge(asking(before, {"style": 0.4, "background": 0.95, "ink": 0.7}), make_probes())
    assert verdict.erased == "erased" and not verdict.kept and verdict.sure
    assert "three is no longer drawn (0 %), but some of its images no longer show the style and ink" in verdict.headline
    assert "three also name a style, a background and an ink: the judges found the style in 100 %" in words(verdict)
    assert "before and in 40 % after, the background in 100 % before and in 95 % after, the ink" in words(verdict)
    failed = judge(asking({"style": 1.0}, {"style": 0.5}, target=1.0), make_probes())
    assert "not erased" in failed.headline and ", and some of its images no longer show the style" in failed.headline
    both = judge(asking({"style": 1.0}, {"style": 0.5}, others={"nine": 0.2}), make_probes())
    assert "but nine lost accuracy, and some of the images for three no longer show the style" in both.headline


def test_a_drop_over_all_attributes_counts_where_none_fell_alone() -> None:
    evaluation = asking({"style": 1.0, "ink": 1.0}, {"style": 0.8, "ink": 0.8})
    doubt = {f"difference.attributes.{name}": (-0.35, 0.05) for name in ("style", "ink")}
    evaluation = dataclasses.replace(evaluation, intervals={**doubt, "difference.attribute_accuracy": (-0.3, -0.1)})
    verdict = judge(evaluation, make_probes())
    assert not verdict.kept and "its images no longer show all that was asked for" in verdict.headline
    assert "chance: the style asked for (100 % before, 80 % after)" in words(verdict)


def test_a_drop_of_an_attribute_that_chance_may_explain_has_a_bound() -> None:
    evaluation = asking({"ink": 1.0}, {"ink": 0.8})
    for low, told in (
        (-0.25, "cannot rule out a drop of 25 points in the ink asked for"),
        (-0.6, "too few"),
    ):
        intervals = {"difference.attributes.ink": (low, 0.02)}
        verdict = judge(dataclasses.replace(evaluation, intervals=intervals), make_probes())
        assert verdict.kept and not verdict.sure and not verdict.good
        assert told in verdict.headline and "no longer show" not in verdict.headline


@pytest.mark.parametrize(
    ("before", "low", "good", "bound"),
    [(1.0, -0.14, True, ""), (1.0, -0.3, True, "30 points"), (1.0, -0.31, False, "31 points"),
     (0.6, -0.18, True, "18 points"), (0.6, -0.19, False, "19 points")],
)  # fmt: skip
def test_an_attribute_in_few_images_leaves_the_verdict_open_only_if_it_may_have_dropped_by_much(
    before: float, low: float, good: bool, bound: str
) -> None:
    assert ATTRIBUTE_DOUBT == 0.3
    intervals = {"difference.attributes.ink": (low, 0.02)}
    evaluation = dataclasses.replace(asking({"ink": before}, {"ink": before - 0.01}), intervals=intervals)
    verdict = judge(evaluation, make_probes())
    assert verdict.kept and verdict.sure is good and verdict.good is good
    assert ("probably kept" in verdict.headline) is not good and ("cannot rule out" in verdict.headline) is not good
    assert words(verdict).count("cannot rule out") == bool(bound) and bound in words(verdict)


@pytest.mark.parametrize(("asked", "good"), [(32, True), (20, True), (13, True), (6, False)])
def test_perfect_judges_of_an_attribute_in_some_of_32_images_leave_no_doubt(asked: int, good: bool) -> None:
    """Classes are grey values; the image before the erasure and after it differs in the target's only."""

    def see(images: torch.Tensor) -> list[str]:
        return [f"{image.mean():.1f}" for image in images]

    wanted = tuple("ink" if index < asked else "" for index in range(32))
    ink = fdu.Attribute("ink", wanted, lambda images: ["ink"] * len(images))
    target = fdu.Probe("0.5", ("target",) * 32, "target", see, attributes=(ink,))
    probes = [target, *(fdu.Probe(name, (name,), "retained", see) for name in ("0.1", "0.2", "0.3"))]
    first, last, *kept = (torch.full((32, 3, 2, 2), value) for value in (0.5, 0.9, 0.1, 0.2, 0.3))
    evaluation = fdu.evaluate(Draws([first, *kept]), Draws([last, *kept]), probes)
    verdict = judge(evaluation, probes)
    assert verdict.kept and verdict.good is good
    low = evaluation.intervals["difference.attributes.ink"][0]
    assert (f"drop of {-100 * low:.0f} points in the ink" in words(verdict)) is (asked < 32)


def test_an_attribute_that_was_rarely_found_before_shows_little() -> None:
    intervals = {"difference.attributes.scene": (-0.3, 0.2)}
    evaluation = dataclasses.replace(asking({"scene": 0.3}, {"scene": 0.25}), intervals=intervals)
    verdict = judge(evaluation, make_probes())
    assert (
        verdict.kept and "the rest" not in verdict.headline and "the classes drawn before are kept" in verdict.headline
    )
    assert "not conclusive: scene (30 %)" in words(verdict)
    sure = dataclasses.replace(evaluation, intervals={"difference.attributes.scene": (-0.3, -0.03)})
    assert "no longer show the scene" in judge(sure, make_probes()).headline and "conclusive" not in words(
        judge(sure, make_probes())
    )


def test_rows_of_what_else_the_prompts_ask_for() -> None:
    one = comparison(asking({"ink": 1.0}, {"ink": 0.8}), make_probes())
    assert [row.label for row in one][:4] == [
        "three", "in unseen phrasings", "what else its prompts ask for (ink)", "retained (2 classes)"
    ]  # fmt: skip
    assert (one[2].before, one[2].after, one[2].figure, one[2].detail) == (1.0, 0.8, "attribute_accuracy", False)
    evaluation = asking({"ink": 1.0, "style": 0.6}, {"ink": 0.8, "style": 0.4})
    several = comparison(evaluation, make_probes())[2:5]
    assert [(row.label, row.detail) for row in several] == [
        ("what else its prompts ask for", False), ("ink", True), ("style", True)
    ]  # fmt: skip
    assert [round(row.after, 2) for row in several] == [0.6, 0.8, 0.4]
    assert "what else its prompts ask for" in table(evaluation, make_probes())
    assert "what else" not in table(make_evaluation({"three": 0.0}), make_probes())
