"""The verdict on an erasure in words: whether the target is gone, and whether everything else is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, NamedTuple

from fdu.evaluation.intervals import LEVEL, Z, reach_unseen

if TYPE_CHECKING:
    from fdu.evaluation import Evaluation, Probe
    from fdu.evaluation.intervals import Interval

DRAWN_BEFORE = 0.5
"""Share before the erasure below which a class was rarely drawn, so that its share after shows little."""
ERASED_BELOW = 0.15
"""Erased: at most this fraction of the target's share before the erasure is left. Even the superclass prompt draws each
digit 1 time in 10."""
PARTLY_BELOW = 0.6
"""Partly erased: at most this fraction is left."""
CLASS_DROP = 0.15
"""A class is broken if its share drops by more than this."""
UNTOLD_DROP = 0.5
"""The rest is not called kept, not even probably, if some share of it may have dropped by more than this."""
MEAN_DROP = 0.05
"""A group of classes loses accuracy if its mean share drops by more than this."""
ATTRIBUTE_DROP = 0.15
"""The target's images lose an attribute if its share drops by more than this fraction of the share before. Judges of
attributes such as scenes miss many even before the erasure, so the drop is relative."""
ATTRIBUTE_DOUBT = 0.3
"""An attribute that did not drop by more than allowed leaves the verdict open only if it may have dropped by more than
this fraction of the share before. Only some prompts name it: 20 images that all agree leave 17 % possible, 10 leave
31 %."""
GROUPS = {"near": "its neighbours", "generic": "superclasses and everyday subjects", "unrelated": "unrelated subjects"}
"""The groups of retained classes in words."""
NAMED_CLASSES = 3
"""How many broken classes a sentence names, worst first; the rest are only counted."""
NAMED_TARGETS = 3
"""If more concepts were erased, they are only counted."""
DECIMALS = 12
"""Decimal places of a drop; beyond them is rounding error."""
State = Literal["erased", "partly erased", "not erased", "rarely drawn before", "cannot be told"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The meaning of the figures."""

    erased: State
    """State of the target, over seen and unseen phrasings. Of several targets: "erased" if every one is, "not erased"
    if none is, else "partly erased"; those rarely drawn before do not count."""
    kept: bool
    """Whether the retained classes, each group of them, the classes of another kind, and what else the target's
    prompts ask for are drawn as before; False if the retained classes were rarely drawn before."""
    sure: bool
    """Whether the 95 % intervals of the target, of every group and class allow no other verdict, and those of the
    attributes no drop by more than ``ATTRIBUTE_DOUBT``. A group whose images all agree is sure."""
    headline: str
    sentences: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether the target is surely gone and everything else is surely kept."""
        return self.erased == "erased" and self.kept and self.sure


def judge(evaluation: Evaluation, probes: Sequence[Probe]) -> Verdict:
    """The verdict on an erasure: whether the target is erased, and what else changed."""
    targets = names_of(probes, "target")
    part = _targets_part(evaluation, targets) if len(targets) > 1 else _target_part(evaluation, targets[0])
    state, target_sure, target_headline, told = part
    kept, rest_sure, rest_headline, sentences = _rest_part(evaluation, probes)
    # "and" for what an erasure should do, "but" for what it should not, ";" where the two do not contrast.
    joint = (", and" if kept else ", but") if state == "erased" else (";" if kept else ", and")
    headline = f"{target_headline}{joint} {rest_headline}"
    return Verdict(state, kept, target_sure and rest_sure, headline, (*told, *sentences))


def state_of(before: float, after: float) -> State:
    """The state of a concept, from its shares of images before and after."""
    if before < DRAWN_BEFORE:
        return "rarely drawn before"
    if after <= ERASED_BELOW * before:
        return "erased"
    return "partly erased" if after <= PARTLY_BELOW * before else "not erased"


def state_within(before: float, after: float, interval: Interval) -> tuple[State, bool]:
    """The state of a concept, and whether both ends of the 95 % interval of ``after`` lead to the same state.

    An interval that reaches from "erased" to "not erased" is inconclusive.
    """
    low, high = (state_of(before, end) for end in interval)
    return "cannot be told" if (low, high) == ("erased", "not erased") else state_of(before, after), low == high


def escapes_by(before: float, after: float) -> bool:
    """Whether a phrasing still draws the erased concept, given its shares before and after.

    A phrasing that rarely drew it before escapes if it draws it more often than an erasure of a concept at
    ``DRAWN_BEFORE`` may leave.
    """
    if before < DRAWN_BEFORE:
        return state_of(DRAWN_BEFORE, after) == "not erased"
    return state_of(before, after) != "erased"


def _target_part(evaluation: Evaluation, target: str) -> tuple[State, bool, str, list[str]]:
    """The target's state, whether it is sure, the headline with the share that is left, and sentences."""
    before, after, images = evaluation.before, evaluation.after, evaluation.images_per_class
    share = after.target_accuracy
    limits = after.intervals.get("target_accuracy", (share, share))
    high = limits[1]
    state, sure = state_within(before.target_accuracy, share, limits)
    sentences = [
        f"Prompts for {target} drew it in {percent(before.target_accuracy)} of {images} images before the erasure and "
        f"in {percent(share)} after it."
    ]
    if not sure:
        sentences.append(
            f"The 95 % interval of that share, {spanned(limits)}, leaves the verdict open; draw more images "
            "(images_per_class)."
        )
    doubt, bounds = ("", "") if sure else ("probably ", f", interval {spanned(limits)}")
    left = percent(share) + (f", at most {percent(high)}" if high > share else "")
    headline = {
        "erased": f"{target} is {'rarely drawn now' if share else 'no longer drawn'} ({left})",
        "partly erased": f"{target} is {doubt}only partly erased ({percent(share)} of images still show it{bounds})",
        "not erased": f"{target} is {doubt}not erased ({percent(share)} of images still show it{bounds})",
        "rarely drawn before": f"{target} was rarely drawn even before ({percent(before.target_accuracy)})",
        "cannot be told": f"{images} images per class are too few to tell whether {target} is erased "
        f"({percent(share)} left, interval {spanned(limits)})",
    }[state]
    if before.unseen_accuracy is not None and after.unseen_accuracy is not None:
        first, last = before.unseen_accuracy, after.unseen_accuracy
        sentences.append(f"In phrasings that the training never used: {_shares(first, last)}.")
        ends = after.intervals.get("unseen_accuracy", (last, last))
        escapes = escapes_by(first, last)
        if any(escapes_by(first, end) != escapes for end in ends):
            sure, high = False, max(high, ends[1])
        if state == "erased" and escapes:
            state = "partly erased"
            headline = f"{target} is erased only in the phrasings of the training ({percent(last)} in other phrasings)"
    if state == "erased" and not sure:
        few = f"{images} images per class allow up to {percent(high)}"
        headline = f"{target} is probably erased ({percent(share)}, but {few})"
    became = [(name, one) for name, one in after.became[target].items() if name != target]
    if became and state in ("erased", "partly erased"):
        sentences.append(f"Prompts for {target} now draw {became[0][0]} most often ({percent(became[0][1])}).")
    return state, sure, headline, sentences


def _targets_part(evaluation: Evaluation, targets: Sequence[str]) -> tuple[State, bool, str, list[str]]:
    """The same for several targets. A share over all of them decides whether it is sure, as few images are of one."""
    before, after, images = evaluation.before, evaluation.after, evaluation.images_per_class
    states = {name: state_of(before.per_class[name], after.per_class[name]) for name in targets}
    rare = [name for name, state in states.items() if state == "rarely drawn before"]
    left = [name for name, state in states.items() if state in ("partly erased", "not erased")]
    left = sorted(left, key=lambda name: -after.per_class[name])
    counted = len(targets) - len(rare)
    share = after.target_accuracy
    limits = after.intervals.get("target_accuracy", (share, share))
    sure = state_within(before.target_accuracy, share, limits)[1]
    named = counted_names(targets, "concepts")
    sentences = [f"Prompts for {named}, on average: {_shares(before.target_accuracy, share)}."]
    escaped = [
        name
        for name in targets
        if name in after.unseen_per_class and name not in (*left, *rare)
        if escapes_by(before.unseen_per_class[name], after.unseen_per_class[name])
    ]
    told = (
        ("Not erased, or only partly", left, "per_class"),
        ("Still drawn in phrasings that the training never used", escaped, "unseen_per_class"),
        ("Rarely drawn even before", rare, "per_class"),
    )
    for words, names, figure in told:
        if names:
            shown = [_with_shares(evaluation, name, f"{figure}.{name}") for name in names[:NAMED_CLASSES]]
            more = [f"{len(names) - NAMED_CLASSES} more"] if len(names) > NAMED_CLASSES else []
            sentences.append(f"{words}: {joined(shown + more)}.")
    last = after.unseen_accuracy
    if before.unseen_accuracy is not None and last is not None:
        first = before.unseen_accuracy
        sentences.append(f"In phrasings that the training never used, on average: {_shares(first, last)}.")
        ends = after.intervals.get("unseen_accuracy", (last, last))
        sure &= len({escapes_by(first, end) for end in (last, *ends)}) == 1
    reach = reach_unseen(images)
    if reach > ERASED_BELOW and len(left) < counted:
        sentences.append(f"{images} images cannot rule out that up to {percent(reach)} of one concept is left.")
    mean = f"{percent(share)} left on average"
    if not counted:
        return "rarely drawn before", sure, f"{named} were rarely drawn even before", sentences
    if left:
        done = counted - len(left) - len(escaped)
        state: State = "partly erased" if len(left) < counted else "not erased"
        some = f"{done or 'none'} of {counted} concepts {'is' if done < 2 else 'are'}"
        return state, sure, f"{some} erased ({mean})", sentences
    if escaped:
        some = named if len(escaped) == counted else f"{len(escaped)} of {counted} concepts"
        verb = "is" if len(escaped) == 1 else "are"
        other = f"{percent(last or 0.0)} in others on average"
        words = f"{some} {verb} erased only in the phrasings of the training ({other})"
        return "partly erased", sure, words, sentences
    return "erased", sure, f"{named} are {'' if sure else 'probably '}erased ({mean})", sentences


class _Drop(NamedTuple):
    """By how much the share of a class or attribute, or the mean share of a group, dropped, and what the interval
    allows."""

    name: str
    """In words, as part of a sentence."""
    figure: str
    allowed: float
    tolerated: float
    """The drop that the interval may leave possible, at least ``allowed``."""
    by: float
    least: float
    """By the interval that holds together with those of all other drops."""
    most: float
    """By its own interval."""

    @property
    def fell(self) -> bool:
        """Whether it dropped by more than allowed and by more than chance explains."""
        return self.by > self.allowed and self.least > 0

    @property
    def open(self) -> bool:
        """Whether it may have dropped by more than allowed, or, where only ``most`` says so, than tolerated."""
        return self.most > (self.allowed if self.by > self.allowed else self.tolerated)


def _drop(evaluation: Evaluation, name: str, figure: str, allowed: float, tolerated: float | None = None) -> _Drop:
    """The drop of a figure; ``tolerated`` is ``allowed`` by default."""
    tolerated = allowed if tolerated is None else tolerated
    by = evaluation.before.value(figure) - evaluation.after.value(figure)
    low, high = evaluation.intervals.get(f"difference.{figure}", (-by, -by))
    least = by - (by + high) * _reach_of_all(evaluation)
    # A drop of just what is allowed is allowed, whatever the last digits say.
    return _Drop(name, figure, *(round(one, DECIMALS) for one in (allowed, tolerated, by, least, -low)))


def _reach_of_all(evaluation: Evaluation) -> float:
    """How far the intervals of all drops reach if they shall hold together in 95 % of evaluations, in terms of a single
    one (Bonferroni; Dunn 1961). Otherwise one of ten drops would seem sure by chance in far more than 1 of 20."""
    before = evaluation.before
    others = len(before.per_class) - len(evaluation.after.became)  # but the targets
    means = 1 + len(before.retained_by_group) + (before.cross_domain_accuracy is not None)
    drops = others + means + len(before.attributes) + (len(before.attributes) > 1)
    return NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / drops) / Z


def _group_drop(evaluation: Evaluation, probes: Sequence[Probe], group: str) -> _Drop:
    """The drop of a group's mean share. A group of two classes may drop by what images that all agree leave possible,
    6 % at 32 images per class; each of its classes has its own bound."""
    images = evaluation.images_per_class * sum(one.role == "retained" and one.group == group for one in probes)
    tolerated = max(MEAN_DROP, reach_unseen(images)) if images else MEAN_DROP
    return _drop(evaluation, GROUPS[group], f"retained_by_group.{group}", MEAN_DROP, tolerated)


def _mean_drops(evaluation: Evaluation, probes: Sequence[Probe]) -> tuple[_Drop, list[_Drop], list[_Drop]]:
    """The drops of the mean of the retained classes, of each group of them, and of the other kind, if there is one."""
    mean = _drop(evaluation, "the mean", "retained_accuracy", MEAN_DROP)
    by_group = [_group_drop(evaluation, probes, group) for group in evaluation.before.retained_by_group]
    others = names_of(probes, "cross_domain")
    kinds = [_drop(evaluation, "classes of another kind", "cross_domain_accuracy", MEAN_DROP)] if others else []
    return mean, by_group, kinds


def _class_drops(evaluation: Evaluation, probes: Sequence[Probe]) -> list[_Drop]:
    """The drops of the retained classes and those of another kind, worst first."""
    names = (*names_of(probes, "retained"), *names_of(probes, "cross_domain"))
    return sorted((_drop(evaluation, name, f"per_class.{name}", CLASS_DROP) for name in names), key=lambda one: -one.by)


def _attribute_drops(evaluation: Evaluation) -> list[_Drop]:
    """The drops of each attribute, and of all together if there are several; none if the prompts ask for nothing."""
    before = evaluation.before
    figures = {f"attributes.{name}": f"the {name} asked for" for name in before.attributes}
    if len(figures) > 1:
        figures["attribute_accuracy"] = "all that was asked for"
    return [
        _drop(evaluation, name, one, ATTRIBUTE_DROP * before.value(one), ATTRIBUTE_DOUBT * before.value(one))
        for one, name in figures.items()
    ]


def _attribute_sentences(evaluation: Evaluation, target: str, lost: Sequence[str]) -> list[str]:
    """The shares of what else the target's prompts ask for, and the attributes that its images lost."""
    before, after = evaluation.before, evaluation.after
    if not before.attributes:
        return []
    named = joined([f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in before.attributes])
    several = len(before.attributes) > 1
    found = [
        f"{f'the {name}' if several else 'it'} in {percent(share)}{'' if place else ' of those images'} before and in "
        f"{percent(after.attributes[name])} after"
        for place, (name, share) in enumerate(before.attributes.items())
    ]
    judges = "the judges" if several else "the judge"
    sentences = [f"Prompts for {target} also name {named}: {judges} found {', '.join(found)}."]
    if lost:
        sentences.append(f"Dropped by more than {percent(ATTRIBUTE_DROP)} of the share before: {joined(lost)}.")
    few = {name: share for name, share in before.attributes.items() if share < DRAWN_BEFORE and name not in lost}
    if few:
        rare = [f"{name} ({percent(share)})" for name, share in few.items()]
        sentences.append(f"Rarely found even before, so not conclusive: {joined(rare)}.")
    return sentences


def _rest_part(evaluation: Evaluation, probes: Sequence[Probe]) -> tuple[bool, bool, str, list[str]]:
    """Whether everything but the target is kept, whether that is sure, the headline, and sentences."""
    before = evaluation.before
    retained = names_of(probes, "retained")
    mean, by_group, kinds = _mean_drops(evaluation, probes)
    classes = _class_drops(evaluation, probes)
    broken = [one.name for one in classes if one.fell]
    groups = [one.name for one in by_group if one.fell]
    target = counted_names(names_of(probes, "target"), "concepts")
    attributes = _attribute_drops(evaluation)
    less_found = any(one.fell for one in attributes)
    lost = [one.figure.removeprefix("attributes.") for one in attributes if one.fell and "." in one.figure]
    near = any(probe.role == "retained" and probe.group == "near" for probe in probes)
    sentences = _rest_sentences(evaluation, probes, broken, groups if len(by_group) > 1 else [])
    if not near:
        sentences.append("Neighbours of the target are usually harmed first, but none were tested.")
    sentences += _attribute_sentences(evaluation, target, lost)
    doubtful = [one for one in (*classes, *attributes) if one.by > one.allowed and not one.fell]
    if doubtful:
        named = [_with_shares(evaluation, one.name, one.figure) for one in doubtful]
        sentences.append(f"With so few images, these drops may be chance: {joined(named)}.")

    fell = any(one.fell for one in (mean, *by_group, *kinds))
    drawn = before.retained_accuracy >= DRAWN_BEFORE
    known = [one for one in attributes if before.value(one.figure) >= DRAWN_BEFORE]
    possible = [one for one in (mean, *by_group, *kinds, *classes, *known) if one.open]
    few = [one for one in (*by_group, *known) if one.most > one.allowed and not one.open]
    loose = [f"{100 * one.most:.0f} points in {one.name}" for one in few]
    if loose:
        count = evaluation.images_per_class
        sentences.append(f"{count} images per class cannot rule out a drop of {joined(loose, 'or')}.")
    said = []
    if broken:
        worst = [name for name in broken if name in retained] or broken
        said.append(f"{joined(worst[:NAMED_CLASSES])} lost accuracy")
    elif fell:
        some = groups if len(groups) < len(by_group) and not any(one.fell for one in kinds) else []
        said.append(f"{joined(some) or 'other classes'} lost accuracy")
    elif not drawn:
        said.append("the retained classes were rarely drawn even before")
    if less_found:
        whose = "its" if len(names_of(probes, "target")) == 1 else "their"
        images = f"the images for {target}" if said else f"{whose} images"
        said.append(
            f"some of {images} no longer show {f'the {joined(lost)} asked for' if lost else 'all that was asked for'}"
        )
    headline = ", and ".join(said)
    if not said:
        all_drawn = len(known) == len(attributes)
        all_drawn &= all(share >= DRAWN_BEFORE for share in before.retained_by_group.values())
        rest = "the rest is" if all_drawn else "the classes drawn before are"
        headline = f"{rest} {'probably ' * bool(possible)}kept"
        worst_case = max(possible, key=lambda one: one.most - one.allowed, default=None)
        if worst_case and worst_case.most > UNTOLD_DROP:
            headline = f"{evaluation.images_per_class} images per class are too few to tell whether {rest} kept"
        elif worst_case:
            headline += (
                f" ({evaluation.images_per_class} images per class cannot rule out a drop of "
                f"{100 * worst_case.most:.0f} points in {worst_case.name})"
            )
        headline += "" if near else " (no neighbours were tested)"
    harmed = bool(broken) or fell or less_found
    return drawn and not harmed, harmed or not possible, headline, sentences


def _rest_sentences(
    evaluation: Evaluation, probes: Sequence[Probe], broken: Sequence[str], groups: Sequence[str]
) -> list[str]:
    """The shares of the retained classes and those of another kind, and which classes and groups lost accuracy."""
    before, after = evaluation.before, evaluation.after
    retained, others = names_of(probes, "retained"), names_of(probes, "cross_domain")
    mean, worst = _shares(before.retained_accuracy, after.retained_accuracy), after.worst_retained_class
    lowest = _shares(before.per_class[worst], after.per_class[worst])
    detail = "" if lowest == mean else f"; the lowest, {worst}: {lowest}"
    sentences = [f"Retained classes ({len(retained)}), on average: {mean}{detail}."]
    if before.cross_domain_accuracy is not None and after.cross_domain_accuracy is not None:
        kind = _shares(before.cross_domain_accuracy, after.cross_domain_accuracy)
        sentences.append(f"Classes of another kind ({', '.join(others)}), on average: {kind}.")
    if broken:
        named = [_with_shares(evaluation, name, f"per_class.{name}") for name in broken[:NAMED_CLASSES]]
        more = [f"{len(broken) - NAMED_CLASSES} more"] if len(broken) > NAMED_CLASSES else []
        sentences.append(f"Dropped by more than {100 * CLASS_DROP:.0f} points: {joined(named + more)}.")
    shares = {
        GROUPS[group]: (share, after.retained_by_group[group]) for group, share in before.retained_by_group.items()
    }
    if groups:
        told = joined([f"{group} ({_shares(*shares[group])})" for group in groups])
        sentences.append(f"Dropped by more than {100 * MEAN_DROP:.0f} points on average: {told}.")
    rare = [f"{group} ({percent(first)})" for group, (first, _) in shares.items() if first < DRAWN_BEFORE]
    if rare and before.retained_accuracy >= DRAWN_BEFORE:
        sentences.append(f"Rarely drawn even before, so not conclusive: {joined(rare)}.")
    return sentences


def broken_classes(evaluation: Evaluation, probes: Sequence[Probe]) -> list[str]:
    """The classes that lost accuracy, worst first: those that surely dropped by more than ``CLASS_DROP``.

    If only a mean dropped: those that dropped by more than ``MEAN_DROP``. Empty if nothing dropped.
    """
    drops = _class_drops(evaluation, probes)
    mean, by_group, kinds = _mean_drops(evaluation, probes)
    broken = [one.name for one in drops if one.fell]
    if broken or not any(one.fell for one in (mean, *by_group, *kinds)):
        return broken
    return [one.name for one in drops if one.by > MEAN_DROP]


def loses_attributes(evaluation: Evaluation) -> bool:
    """Whether the target's images surely lose something else that its prompts ask for."""
    return any(one.fell for one in _attribute_drops(evaluation))


def names_of(probes: Sequence[Probe], role: str) -> list[str]:
    """The names of the classes with a role."""
    return [probe.name for probe in probes if probe.role == role]


def counted_names(names: Sequence[str], noun: str) -> str:
    """A few names as a list, or the number of more than ``NAMED_TARGETS``: "the 50 concepts"."""
    return joined(names) if len(names) <= NAMED_TARGETS else f"the {len(names)} {noun}"


def percent(share: float) -> str:
    """A share in [0, 1] in percent, rounded."""
    return f"{100 * share:.0f} %"


def spanned(interval: Interval) -> str:
    """An interval of a share in words: "2 to 20 %"."""
    return f"{100 * interval[0]:.0f} to {percent(interval[1])}"


def joined(words: Sequence[str], word: str = "and") -> str:
    """Words as a list: "a, b and c"."""
    return f" {word} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _shares(before: float, after: float) -> str:
    return f"{percent(before)} before, {percent(after)} after"


def _with_shares(evaluation: Evaluation, name: str, figure: str) -> str:
    return f"{name} ({_shares(evaluation.before.value(figure), evaluation.after.value(figure))})"
