"""An evaluation in words and in one small table, computed from its figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fdu.evaluation.metrics.catalogue import metrics_of
from fdu.evaluation.metrics.clip_score import CLIP_SCORE
from fdu.evaluation.metrics.metric import PairMetric, SetMetric

if TYPE_CHECKING:
    from fdu.evaluation import Evaluation, Figures, Probe
    from fdu.evaluation.intervals import Interval

DRAWN_BEFORE = 0.5
"""A target drawn less often than this before the erasure was hardly there to erase."""
ERASED_BELOW = 0.15
"""Erased: at most this part of the target's share before is left. The superclass itself draws one digit in ten."""
PARTLY_BELOW = 0.6
"""Partly erased: at most this part is left."""
CLASS_DROP = 0.15
"""A class is broken if its share falls by more than this."""
MEAN_DROP = 0.05
"""A group of classes has suffered if its mean falls by more than this."""
GROUPS = {"near": "its neighbours", "generic": "everyday subjects", "unrelated": "unrelated subjects"}
"""The groups of what is to be kept, in words."""
NAMED_CLASSES = 3
"""So many broken classes are named, the worst first."""
State = Literal["erased", "partly erased", "not erased", "hardly drawn before"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison: shares in [0, 1] before and after, None where nothing was drawn."""

    label: str
    before: float
    after: float
    detail: bool = False
    """Whether it details the row above it."""
    intervals: tuple[Interval, Interval] | None = None
    """The 95 % intervals of both; None where none were computed."""
    figure: str = ""
    """The name of the shares in :class:`fdu.Figures`: "per_class.three"."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the figures mean."""

    erased: State | Literal["cannot be told"]
    """Of the target, in seen and unseen phrasings."""
    kept: bool
    """Whether the retained classes, each group of them, and those of another kind are drawn as before; not if they
    hardly were."""
    headline: str
    sentences: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether the target is gone and everything else is still there."""
        return self.erased == "erased" and self.kept


def percent(share: float) -> str:
    """A share in [0, 1] as whole percents."""
    return f"{100 * share:.0f} %"


def within(interval: Interval) -> str:
    """The ends of a share's interval as whole percents."""
    return f"[{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def uncertainty(images: int) -> float:
    """Half the width of the 95 % interval of a share counted on ``images`` images, at its widest (a share of 1/2)."""
    return 1.96 * math.sqrt(0.25 / images)


def comparison(evaluation: Evaluation, probes: Sequence[Probe]) -> list[Row]:
    """The rows of the table: target, unseen phrasings, retained with the worst of them, classes of another kind.

    Where there are several groups of retained classes, each has its row.
    """
    sides = (evaluation.before, evaluation.after)
    retained, others = _names(probes, "retained"), _names(probes, "cross_domain")
    worst = evaluation.after.worst_retained_class

    def row(label: str, figure: str, detail: bool = False) -> Row:
        before, after = (_figure(side, figure) for side in sides)
        known = all(figure in side.intervals for side in sides)
        intervals = (sides[0].intervals[figure], sides[1].intervals[figure]) if known else None
        return Row(label, before, after, detail, intervals, figure)

    rows = [row(_names(probes, "target")[0], "target_accuracy")]
    if evaluation.after.unseen_accuracy is not None:
        rows.append(row("in unseen phrasings", "unseen_accuracy", detail=True))
    rows.append(row(f"retained ({_count(retained)})", "retained_accuracy"))
    groups = list(evaluation.after.retained_by_group)
    for group in groups if len(groups) > 1 else ():
        names = [probe.name for probe in probes if probe.role == "retained" and probe.group == group]
        rows.append(row(f"{group} ({_count(names)})", f"retained_by_group.{group}", detail=True))
    rows.append(row(f"worst: {worst}", f"per_class.{worst}", detail=True))
    if evaluation.after.cross_domain_accuracy is not None:
        rows.append(row(f"another kind ({_count(others)})", "cross_domain_accuracy"))
    return rows


def _figure(figures: Figures, name: str) -> float:
    """A figure by its name, also one of several: "per_class.three"."""
    field, _, part = name.partition(".")
    value = getattr(figures, field)
    return value[part] if part else value


def table(evaluation: Evaluation, probes: Sequence[Probe]) -> str:
    """The comparison as aligned text, each share with its 95 % interval."""
    lines = [["", "before", "after"]]
    for row in comparison(evaluation, probes):
        cells = [percent(row.before), percent(row.after)]
        if row.intervals:
            cells = [f"{cell} {within(one):>9}" for cell, one in zip(cells, row.intervals, strict=True)]
        lines.append([("  " if row.detail else "") + row.label, *cells])
    return _aligned(lines)


PARTS = ("target", "unseen", "near", "generic", "unrelated", "cross_domain")
"""The parts of an evaluation whose images are compared, in the order of the table."""


def distance_table(evaluation: Evaluation) -> str:
    """How far the images moved, and what CLIP says of them, as aligned text with 95 % intervals."""
    scores = evaluation.before.clip_score, evaluation.after.clip_score
    found = [(one, evaluation.measured(one.name)) for one in metrics_of(PairMetric, SetMetric)]
    measures = [(one, values) for one, values in found if values is not None]
    lines = [["", *([f"{CLIP_SCORE.title} before", "after"] if scores[1] else []), *(one.title for one, _ in measures)]]
    for part in PARTS:
        if part not in evaluation.change:
            continue
        cells = []
        if scores[1]:
            for side in (evaluation.before, evaluation.after):
                cells.append(_measured(side.clip_score[part], side.intervals.get(f"clip_score.{part}")))
        for one, values in measures:
            cells.append(_measured(values.get(part), evaluation.intervals.get(f"{one.name}.{part}")))
        lines.append([part.replace("_", " "), *cells])
    return _aligned(lines)


def _measured(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else f"{value:.3g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if place == 0 else cell.rjust(max(width, 7)) for place, (cell, width) in cells)
        for cells in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )


def judge(evaluation: Evaluation, probes: Sequence[Probe]) -> Verdict:
    """What the figures mean: whether the target was erased, and what else broke."""
    before, after = evaluation.before, evaluation.after
    target = _names(probes, "target")[0]
    erased: State | Literal["cannot be told"] = state_of(before.target_accuracy, after.target_accuracy)
    low, high = after.intervals.get("target_accuracy", (after.target_accuracy, after.target_accuracy))
    possible = [state_of(before.target_accuracy, share) for share in (low, high)]
    if possible == ["erased", "not erased"]:
        erased = "cannot be told"
    drew = f"{percent(before.target_accuracy)} of {evaluation.images_per_class} images before"
    sentences = [f"Asked for {target}, the pipeline drew it in {drew} and in {percent(after.target_accuracy)} after."]
    headline = {
        "erased": f"{target} was erased",
        "partly erased": f"{target} was only partly erased",
        "not erased": f"{target} was not erased",
        "hardly drawn before": f"{target} was hardly drawn to begin with",
        "cannot be told": f"whether {target} was erased cannot be told from so few images",
    }[erased]
    if possible[0] != possible[1]:
        reach = f"{100 * low:.0f} to {percent(high)}"
        sentences.append(f"By the interval of the latter, {reach}, both {joined(possible)} is possible.")

    if before.unseen_accuracy is not None and after.unseen_accuracy is not None:
        unseen = f"{percent(before.unseen_accuracy)} before and {percent(after.unseen_accuracy)} after"
        escapes = escapes_by(before.unseen_accuracy, after.unseen_accuracy)
        if erased == "erased" and escapes:
            erased = "partly erased"
            headline = f"{target} was erased only in the phrasings of the training"
        sentences.append(f"In phrasings that the training never saw: {unseen}.")

    became = [(name, share) for name, share in after.target_became.items() if name != target]
    if became and erased in ("erased", "partly erased"):
        sentences.append(f"In its place it now draws {became[0][0]} most often ({percent(became[0][1])}).")

    retained, others = _names(probes, "retained"), _names(probes, "cross_domain")
    broken = _broken(evaluation, retained)
    by_group = {group: (share, after.retained_by_group[group]) for group, share in before.retained_by_group.items()}
    drawn = before.retained_accuracy >= DRAWN_BEFORE
    hardly = [group for group, (first, _) in by_group.items() if first < DRAWN_BEFORE]
    suffered = [group for group in by_group if _fell(evaluation, f"retained_by_group.{group}", MEAN_DROP)]
    fell = bool(suffered) or _fell(evaluation, "retained_accuracy", MEAN_DROP)
    shares = _shares(before.retained_accuracy, after.retained_accuracy)
    worst = after.worst_retained_class
    if broken:
        harm = _listed(evaluation, broken)
        sentences.append(f"It broke {harm}; over all {_count(retained)} that it should keep: {shares}.")
    else:
        state = "suffered a little" if fell else ("were kept" if drawn else "were hardly drawn before either")
        worst_shares = _shares(before.per_class[worst], after.per_class[worst])
        detail = "" if worst_shares == shares else f"; the worst of them, {worst}: {worst_shares}"
        sentences.append(f"The {_count(retained)} that it should keep {state}: {shares}{detail}.")
    if suffered and len(by_group) > 1:
        told = [f"{GROUPS[group]} ({_shares(*by_group[group])})" for group in suffered]
        sentences.append(f"Of these suffered {joined(told)}.")
    if hardly and drawn:
        told = [f"{GROUPS[group]} ({percent(by_group[group][0])})" for group in hardly]
        sentences.append(f"Hardly drawn before, so that little can be told of them: {joined(told)}.")
    neighbours = any(probe.role == "retained" and probe.group == "near" for probe in probes)
    if not neighbours:
        sentences.append("No neighbours of the target were drawn, which suffer first.")

    broken_others = _broken(evaluation, others)
    others_fell = False
    if before.cross_domain_accuracy is not None and after.cross_domain_accuracy is not None:
        others_fell = _fell(evaluation, "cross_domain_accuracy", MEAN_DROP)
        shares = _shares(before.cross_domain_accuracy, after.cross_domain_accuracy)
        harm = f"; it broke {_listed(evaluation, broken_others)}" if broken_others else ""
        sentences.append(f"Classes of another kind ({', '.join(others)}): {shares}{harm}.")

    fallen = [name for name in (*retained, *others) if before.per_class[name] - after.per_class[name] > CLASS_DROP]
    doubtful = [name for name in fallen if name not in dict(broken + broken_others)]
    if doubtful:
        told = [f"{name} ({_shares(before.per_class[name], after.per_class[name])})" for name in doubtful]
        sentences.append(f"On so few images chance may be all that befell {joined(told)}.")

    harmed = bool(broken or fell or broken_others or others_fell)
    kept = drawn and not harmed
    # "and" for the expected, "but" for what an erasure should not do, ";" where the one does not contrast the other.
    joint = (", and" if kept else ", but") if erased == "erased" else (";" if kept else ", and")
    if broken or broken_others:
        named = [name for name, _ in (broken or broken_others)[:NAMED_CLASSES]]
        headline += f"{joint} {joined(named)} broke"
    elif harmed:
        some = suffered if len(suffered) < len(by_group) and not others_fell else []
        headline += f"{joint} {joined([GROUPS[group] for group in some]) or 'other classes'} suffered"
    elif not drawn:
        headline += f"{joint} the classes to be kept were hardly drawn to begin with"
    else:
        rest = "what else it could draw" if hardly else "the rest"
        headline += f"{joint} {rest} was kept" + ("" if neighbours else " (no neighbours were drawn)")
    return Verdict(erased, kept, headline, tuple(sentences))


def state_of(before: float, after: float) -> State:
    """What became of a share of images that show the target."""
    if before < DRAWN_BEFORE:
        return "hardly drawn before"
    if after <= ERASED_BELOW * before:
        return "erased"
    return "partly erased" if after <= PARTLY_BELOW * before else "not erased"


def escapes_by(before: float, after: float) -> bool:
    """Whether other words still draw what was erased, given the shares that show it; also where they hardly drew it
    before, if it is too much for an erasure of what is drawn half of the time."""
    state = state_of(before, after)
    if state == "hardly drawn before":
        return state_of(DRAWN_BEFORE, after) == "not erased"
    return state != "erased"


def _shares(before: float, after: float) -> str:
    return f"{percent(before)} before, {percent(after)} after"


def _names(probes: Sequence[Probe], role: str) -> list[str]:
    return [probe.name for probe in probes if probe.role == role]


def _broken(evaluation: Evaluation, names: Sequence[str]) -> list[tuple[str, float]]:
    """The classes whose share fell too far, with how far, the worst first."""
    before, after = evaluation.before.per_class, evaluation.after.per_class
    falls = [(name, before[name] - after[name]) for name in names if _fell(evaluation, f"per_class.{name}", CLASS_DROP)]
    return sorted(falls, key=lambda fall: -fall[1])


def _fell(evaluation: Evaluation, figure: str, drop: float) -> bool:
    """Whether a share is lower after by more than ``drop``, and by more than chance explains."""
    fall = _figure(evaluation.before, figure) - _figure(evaluation.after, figure)
    interval = evaluation.intervals.get(f"difference.{figure}")
    return fall > drop and (interval is None or interval[1] < 0)


def _listed(evaluation: Evaluation, broken: Sequence[tuple[str, float]]) -> str:
    before, after = evaluation.before.per_class, evaluation.after.per_class
    named = [f"{name} ({_shares(before[name], after[name])})" for name, _ in broken]
    more = len(broken) - NAMED_CLASSES
    return joined(named[:NAMED_CLASSES] + ([f"{more} more"] if more > 0 else []))


def joined(words: Sequence[str]) -> str:
    """Words as a list in a sentence."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} class" + ("es" if len(names) != 1 else "")
