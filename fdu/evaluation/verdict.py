"""An evaluation as a verdict in words and as a small table, both computed from its figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fdu.evaluation.metrics.catalogue import metrics_of
from fdu.evaluation.metrics.clip_score import CLIP_SCORE
from fdu.evaluation.metrics.metric import Metric, PairMetric, SetMetric

if TYPE_CHECKING:
    from fdu.evaluation import Evaluation, Figures, Probe
    from fdu.evaluation.intervals import Interval

DRAWN_BEFORE = 0.5
"""Share before the erasure below which a class was rarely drawn, so that its share after shows little."""
ERASED_BELOW = 0.15
"""Erased: at most this fraction of the target's share before is left. The superclass itself draws 1 digit in 10."""
PARTLY_BELOW = 0.6
"""Partly erased: at most this fraction is left."""
CLASS_DROP = 0.15
"""A class is broken if its share drops by more than this."""
MEAN_DROP = 0.05
"""A group of classes loses accuracy if its mean share drops by more than this."""
GROUPS = {"near": "its neighbours", "generic": "everyday subjects", "unrelated": "unrelated subjects"}
"""The groups of retained classes in words."""
NAMED_CLASSES = 3
"""Broken classes named in a sentence, the worst first; of further ones the number is given."""
State = Literal["erased", "partly erased", "not erased", "rarely drawn before", "cannot be told"]


def summary(evaluation: Evaluation, probes: Sequence[Probe]) -> str:
    """The tables of an evaluation and the headline of its verdict."""
    parts = [table(evaluation, probes)]
    if evaluation.features:
        name = evaluation.features
        parts.append(f"Images after against before, in the features of {name}:\n{distance_table(evaluation)}")
    return "\n\n".join([*parts, f"{judge(evaluation, probes).headline}."])


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the comparison: shares in [0, 1] before and after, None where nothing was drawn."""

    label: str
    before: float
    after: float
    detail: bool = False
    """Whether it details the row above it."""
    intervals: tuple[Interval, Interval] | None = None
    """95 % intervals of both shares; None if none were computed."""
    figure: str = ""
    """The name of the shares in :class:`fdu.Figures`: "per_class.three"."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The meaning of the figures."""

    erased: State
    """State of the target, over seen and unseen phrasings."""
    kept: bool
    """Whether the retained classes, each group of them, and the classes of another kind are drawn as before; False if
    they were rarely drawn before."""
    sure: bool
    """Whether both ends of the 95 % intervals lead to the same verdict."""
    headline: str
    sentences: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether the target is surely gone and everything else is surely kept."""
        return self.erased == "erased" and self.kept and self.sure


def percent(share: float) -> str:
    """A share in [0, 1] in percent, rounded."""
    return f"{100 * share:.0f} %"


def uncertainty(images: int) -> float:
    """Half the width of a share's 95 % interval on ``images`` images, at its widest (a share of 1/2)."""
    return 1.96 * math.sqrt(0.25 / images)


def comparison(evaluation: Evaluation, probes: Sequence[Probe]) -> list[Row]:
    """The rows of the table: target, unseen phrasings, retained classes and the worst of them, classes of another kind.

    Several groups of retained classes have a row each.
    """
    sides = (evaluation.before, evaluation.after)
    retained, others = _names(probes, "retained"), _names(probes, "cross_domain")
    worst = evaluation.after.worst_retained_class

    def row(label: str, figure: str, detail: bool = False) -> Row:
        before, after = (figure_of(side, figure) for side in sides)
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


def figure_of(figures: Figures, name: str) -> float:
    """A figure by its name; a dot picks one of several: "per_class.three"."""
    field, _, part = name.partition(".")
    value = getattr(figures, field)
    return value[part] if part else value


def table(evaluation: Evaluation, probes: Sequence[Probe]) -> str:
    """The comparison as aligned text, each share with its 95 % interval."""
    lines = [["", "before", "after"]]
    for row in comparison(evaluation, probes):
        cells = [percent(row.before), percent(row.after)]
        for place, (low, high) in enumerate(row.intervals or ()):
            cells[place] += f" {f'[{100 * low:.0f}, {100 * high:.0f}]':>9}"
        lines.append([("  " if row.detail else "") + row.label, *cells])
    return _aligned(lines)


PARTS = ("target", "unseen", "near", "generic", "unrelated", "cross_domain")
"""The parts of an evaluation with distances, in the order of the table."""


Measured = tuple[float, "Interval | None"]
"""A figure and its interval."""


def distance_columns(evaluation: Evaluation) -> list[tuple[str, Metric, dict[str, Measured]]]:
    """Title, metric and figures by part of each column in the table of distances and CLIP scores."""
    before, after, score = evaluation.before, evaluation.after, f"{CLIP_SCORE.name}."
    apart = {key.removeprefix(score): one for key, one in evaluation.difference.items() if key.startswith(score)}
    given: list[tuple[str, Metric, Mapping[str, float], Figures | Evaluation, str]] = [
        (f"{CLIP_SCORE.title} before", CLIP_SCORE, before.clip_score, before, score),
        (f"{CLIP_SCORE.title} after", CLIP_SCORE, after.clip_score, after, score),
        (f"{CLIP_SCORE.title}, difference", CLIP_SCORE, apart, evaluation, f"difference.{score}"),
    ]
    for one in metrics_of(PairMetric, SetMetric):
        given.append((one.title, one, evaluation.measured(one.name) or {}, evaluation, f"{one.name}."))
    return [
        (title, metric, {part: (value, side.intervals.get(f"{name}{part}")) for part, value in values.items()})
        for title, metric, values, side, name in given
        if values
    ]


def distance_table(evaluation: Evaluation) -> str:
    """Distances between the images before and after, and their CLIP scores, as aligned text with 95 % intervals."""
    columns = [column for column in distance_columns(evaluation) if not column[0].endswith("difference")]
    lines = [["", *(title for title, _, _ in columns)]]
    for part in PARTS:
        if part in evaluation.change:
            cells = [_measured(*values.get(part, (None, None))) for _, _, values in columns]
            lines.append([part.replace("_", " "), *cells])
    return _aligned(lines)


def _measured(value: float | None, interval: Interval | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else f"{value:.3g}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first aligned left, the others right."""
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(max(width, 7)) for cell, width in zip(cells, others, strict=True))])
        for name, *cells in lines
    )


class _Part(NamedTuple):
    """One half of a verdict: on the target, or on everything else."""

    state: Any
    sure: bool
    headline: str
    sentences: list[str]


def judge(evaluation: Evaluation, probes: Sequence[Probe]) -> Verdict:
    """The verdict on an erasure: whether the target is erased, and what else changed."""
    target, rest = _target_part(evaluation, _names(probes, "target")[0]), _rest_part(evaluation, probes)
    erased, kept = target.state == "erased", rest.state == "kept"
    # "and" for what an erasure should do, "but" for what it should not, ";" where the two do not contrast.
    joint = (", and" if kept else ", but") if erased else (";" if kept else ", and")
    headline = f"{target.headline}{joint} {rest.headline}"
    return Verdict(target.state, kept, target.sure and rest.sure, headline, (*target.sentences, *rest.sentences))


def _target_part(evaluation: Evaluation, target: str) -> _Part:
    """Whether the target is erased. The headline names the share left and, from the interval, how sure that is."""
    before, after, images = evaluation.before, evaluation.after, evaluation.images_per_class
    share = after.target_accuracy
    low, high = after.intervals.get("target_accuracy", (share, share))
    state: State = state_of(before.target_accuracy, share)
    ends = [state_of(before.target_accuracy, end) for end in (low, high)]
    sure, reach = ends[0] == ends[1], high
    sentences = [
        f"Prompts for {target} drew it in {percent(before.target_accuracy)} of {images} images before the erasure and "
        f"in {percent(share)} after it."
    ]
    if not sure:
        sentences.append(
            f"With {images} images per class the 95 % interval of that share is {100 * low:.0f} to {percent(high)}, "
            f"which covers {joined(ends)}; draw more to be sure (images_per_class)."
        )
    if ends == ["erased", "not erased"]:
        state = "cannot be told"
    left = percent(share) + (f", at most {percent(high)}" if high > share else "")
    doubt, bounds = ("", "") if sure else ("probably ", f", interval {100 * low:.0f} to {percent(high)}")
    headline = {
        "erased": f"{target} is {'rarely drawn now' if share else 'no longer drawn'} ({left})",
        "partly erased": f"{target} is {doubt}only partly erased ({percent(share)} of images still show it{bounds})",
        "not erased": f"{target} is {doubt}not erased ({percent(share)} of images still show it{bounds})",
        "rarely drawn before": f"{target} was rarely drawn even before ({percent(before.target_accuracy)})",
        "cannot be told": f"{images} images per class are too few to tell whether {target} is erased "
        f"({percent(share)} left, interval {100 * low:.0f} to {percent(high)})",
    }[state]
    if before.unseen_accuracy is not None and after.unseen_accuracy is not None:
        first, last = before.unseen_accuracy, after.unseen_accuracy
        sentences.append(f"In phrasings that the training never used: {_shares(first, last)}.")
        limits = after.intervals.get("unseen_accuracy", (last, last))
        escapes = escapes_by(first, last)
        if escapes != escapes_by(first, limits[0]) or escapes != escapes_by(first, limits[1]):
            sure, reach = False, max(reach, limits[1])
        if state == "erased" and escapes:
            state = "partly erased"
            headline = (
                f"{target} is erased only in the training's phrasings (in others {percent(last)} of images show it)"
            )
    if state == "erased" and not sure:
        few = f"{images} images per class allow up to {percent(reach)}"
        headline = f"{target} is probably erased ({percent(share)}, but {few})"
    became = [(name, one) for name, one in after.target_became.items() if name != target]
    if became and state in ("erased", "partly erased"):
        sentences.append(f"These prompts now draw {became[0][0]} most often ({percent(became[0][1])}).")
    return _Part(state, sure, headline, sentences)


def _rest_part(evaluation: Evaluation, probes: Sequence[Probe]) -> _Part:
    """Whether everything but the target is drawn as before."""
    before, after = evaluation.before, evaluation.after
    retained, others = _names(probes, "retained"), _names(probes, "cross_domain")
    by_group = {group: (share, after.retained_by_group[group]) for group, share in before.retained_by_group.items()}
    figures = ["retained_accuracy", *(f"retained_by_group.{group}" for group in by_group)]
    falls = {name: before.per_class[name] - after.per_class[name] for name in (*retained, *others)}
    large = sorted((name for name in falls if falls[name] > CLASS_DROP), key=lambda name: -falls[name])
    broken = [name for name in large if _fell(evaluation, f"per_class.{name}", CLASS_DROP)]
    sentences = _retained_sentences(evaluation, retained, [name for name in broken if name in retained], by_group)
    near = any(probe.role == "retained" and probe.group == "near" for probe in probes)
    if not near:
        sentences.append("No neighbours of the target were tested, and they suffer first.")
    if before.cross_domain_accuracy is not None and after.cross_domain_accuracy is not None:
        figures.append("cross_domain_accuracy")
        shares = _shares(before.cross_domain_accuracy, after.cross_domain_accuracy)
        sentences.append(f"Classes of another kind ({', '.join(others)}): {shares}.")
        if any(name in others for name in broken):
            sentences.append(_loss_sentence(evaluation, [name for name in broken if name in others]))
    doubtful = [name for name in falls if name in large and name not in broken]
    if doubtful:
        named = [_with_shares(evaluation, name) for name in doubtful]
        sentences.append(f"With so few images, these drops may be chance: {joined(named)}.")

    fell = [figure for figure in figures if _fell(evaluation, figure, MEAN_DROP)]
    drawn = before.retained_accuracy >= DRAWN_BEFORE
    lost = max(0.0, *(-evaluation.intervals.get(f"difference.{figure}", (0.0, 0.0))[0] for figure in figures))
    sure = bool(broken or fell) or not (doubtful or lost > MEAN_DROP)
    if broken:
        worst = [name for name in broken if name in retained] or broken
        headline = f"{joined(worst[:NAMED_CLASSES])} lost accuracy"
    elif fell:
        groups = [group for group in by_group if f"retained_by_group.{group}" in fell]
        some = groups if len(groups) < len(by_group) and "cross_domain_accuracy" not in fell else []
        headline = f"{joined([GROUPS[group] for group in some]) or 'other classes'} lost accuracy"
    elif not drawn:
        headline = "the retained classes were rarely drawn even before"
    else:
        all_drawn = all(first >= DRAWN_BEFORE for first, _ in by_group.values())
        rest = "the rest is" if all_drawn else "the classes that it drew before are"
        doubt = "" if sure else f" (the intervals allow a drop of {100 * lost:.0f} points)"
        headline = f"{rest} {'' if sure else 'probably '}kept" + (doubt if lost > MEAN_DROP else "")
        headline += "" if near else " (no neighbours were tested)"
    return _Part("kept" if drawn and not broken and not fell else "not kept", sure, headline, sentences)


def _retained_sentences(
    evaluation: Evaluation,
    retained: Sequence[str],
    broken: Sequence[str],
    by_group: Mapping[str, tuple[float, float]],
) -> list[str]:
    """What became of the retained classes, all together and by group."""
    before, after = evaluation.before, evaluation.after
    shares, worst = _shares(before.retained_accuracy, after.retained_accuracy), after.worst_retained_class
    suffered = [group for group in by_group if _fell(evaluation, f"retained_by_group.{group}", MEAN_DROP)]
    drawn = before.retained_accuracy >= DRAWN_BEFORE
    sentences = []
    if broken:
        sentences += [
            _loss_sentence(evaluation, broken),
            f"Mean of the {_count(retained)} to retain: {shares}.",
        ]
    else:
        fell = suffered or _fell(evaluation, "retained_accuracy", MEAN_DROP)
        state = (
            "lost some accuracy"
            if fell
            else (f"{_be(retained)} kept" if drawn else f"{_be(retained, past=True)} rarely drawn even before")
        )
        lowest = _shares(before.per_class[worst], after.per_class[worst])
        detail = "" if lowest == shares else f"; the lowest, {worst}: {lowest}"
        sentences.append(f"The {_count(retained)} to retain {state}: {shares}{detail}.")
    if suffered and len(by_group) > 1:
        told = [f"{GROUPS[group]} ({_shares(*by_group[group])})" for group in suffered]
        sentences.append(f"{_these(told, 'group')} lost accuracy: {joined(told)}.")
    rare = [f"{GROUPS[group]} ({percent(first)})" for group, (first, _) in by_group.items() if first < DRAWN_BEFORE]
    if rare and drawn:
        sentences.append(
            f"{_these(rare, 'group')} {_be(rare, past=True)} rarely drawn before, which shows little: {joined(rare)}."
        )
    return sentences


def state_of(before: float, after: float) -> State:
    """The state of a concept, from its shares of images before and after."""
    if before < DRAWN_BEFORE:
        return "rarely drawn before"
    if after <= ERASED_BELOW * before:
        return "erased"
    return "partly erased" if after <= PARTLY_BELOW * before else "not erased"


def escapes_by(before: float, after: float) -> bool:
    """Whether a phrasing still draws the erased concept, given its shares before and after.

    A phrasing that rarely drew it before escapes if it draws it more often than an erasure of a concept at
    ``DRAWN_BEFORE`` may leave.
    """
    state = state_of(before, after)
    if state == "rarely drawn before":
        return state_of(DRAWN_BEFORE, after) == "not erased"
    return state != "erased"


def _shares(before: float, after: float) -> str:
    return f"{percent(before)} before, {percent(after)} after"


def _names(probes: Sequence[Probe], role: str) -> list[str]:
    return [probe.name for probe in probes if probe.role == role]


def _fell(evaluation: Evaluation, figure: str, drop: float) -> bool:
    """Whether a share dropped by more than ``drop`` and by more than chance explains."""
    fall = figure_of(evaluation.before, figure) - figure_of(evaluation.after, figure)
    interval = evaluation.intervals.get(f"difference.{figure}")
    return fall > drop and (interval is None or interval[1] < 0)


def _with_shares(evaluation: Evaluation, name: str) -> str:
    return f"{name} ({_shares(evaluation.before.per_class[name], evaluation.after.per_class[name])})"


def _loss_sentence(evaluation: Evaluation, broken: Sequence[str]) -> str:
    """The broken classes with their shares, the worst first."""
    named = [_with_shares(evaluation, name) for name in broken[:NAMED_CLASSES]]
    more = [f"{len(broken) - NAMED_CLASSES} more"] if len(broken) > NAMED_CLASSES else []
    return f"{_these(broken, 'class')} lost more than {100 * CLASS_DROP:.0f} points: {joined(named + more)}."


def joined(words: Sequence[str]) -> str:
    """Words as a list: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} class" + ("es" if len(names) != 1 else "")


def _these(names: Sequence[str], noun: str) -> str:
    return f"This {noun}" if len(names) == 1 else f"These {noun}{'es' if noun.endswith('s') else 's'}"


def _be(names: Sequence[str], past: bool = False) -> str:
    return (("was", "were") if past else ("is", "are"))[len(names) != 1]
