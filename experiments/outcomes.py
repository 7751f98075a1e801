"""What became of one target: its seen and unseen phrasings, close and other classes, and what else was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from experiment import Suite, changes, embedded

from fdu.comparison.front import TARGET_ROLES, Estimate, Judged, Sample, complete
from fdu.comparison.page import markdown, percent
from fdu.comparison.plan import Candidate
from fdu.comparison.results import Results, shares
from fdu.comparison.runs import before_name
from fdu.comparison.sweep import Records

COLUMNS = ("erased, seen", "erased, unseen", "near", "far", "attributes", "change")
"""The columns of a table. Near are neighbours of the target, and the anchor unless it includes the target; far are all
other classes that were drawn."""

LEFT, KEPT, ASKED = 0.05, 0.95, 0.9
"""The bounds: the largest share of the target's images that still show it, beyond the share by chance where the anchor
includes the target; the smallest shares of near classes and of attributes, relative to those before."""


class Outcome:
    """The figures of all candidates on one target.

    Args:
        results: those of a suite.
        target: one of its targets, with a complete seed.
        before: the judge's view of the target's probes before any erasure.
    """

    def __init__(self, results: Results, target: str, before: tuple[Judged, ...] = ()) -> None:
        self.candidates = results.sample.candidates
        finished = complete(results.runs, self.candidates)
        self.runs = {key: tuple(runs) for key, runs in finished.items() if key[0] == target}
        self.all = Sample(self.runs, self.candidates)
        self.anchor = dict(results.comparison.pairs)[target]
        content = embedded(results.comparison.model).content
        self.chance = content.chance(target, self.anchor)
        """The share of images for the anchor that show the target, if it draws all that it can mean equally often."""
        probes = content.probes(target, anchor=self.anchor)
        self._near = {one.name for one in probes if one.role == "retained" and one.group == "near"}
        if not self.chance:
            self._near |= {one.name for one in probes if one.name == self.anchor}
        self._parts = {kind: self._only(kind) for kind in COLUMNS[:4]}
        shown = {kind: [fmean(one.hits) for one in before if self._kind(one) == kind] for kind in self._parts}
        self.before = {kind: fmean(own) if own else math.nan for kind, own in shown.items()}
        """The figures of ``COLUMNS`` before any erasure, but the last; NaN without probes of that kind."""
        for kind in COLUMNS[:2]:
            self.before[kind] = 1 - self.before[kind]
        self.before["attributes"] = shares(before)[2] if before else math.nan

    def _kind(self, one: Judged) -> str:
        """The column of a probe."""
        if one.role in TARGET_ROLES:
            return f"erased, {'seen' if one.role == 'target' else 'unseen'}"
        return "near" if one.name in self._near else "far"

    def _only(self, kind: str) -> Sample:
        """The figures of the probes of one kind."""
        chosen = {key: tuple(one for one in runs if self._kind(one) == kind) for key, runs in self.runs.items()}
        return Sample(chosen, self.candidates)

    def estimate(self, figure: str, one: Candidate) -> Estimate:
        """A figure of ``COLUMNS`` with its interval."""
        if figure in self._parts:
            return self._parts[figure].estimate("erased" if figure.startswith("erased") else "retained", one)
        return self.all.estimate(figure, one)

    def cells(self, one: Candidate) -> list[str]:
        """All figures in percent, for a row of a table."""
        return [percent(self.estimate(name, one), 2 if name == "change" else 1) for name in COLUMNS]

    @property
    def cells_before(self) -> list[str]:
        """The figures before any erasure in percent, for a row of a table."""
        return ["-" if math.isnan(value) else f"{100 * value:.1f}" for value in self.before.values()] + ["-"]

    def broken(self, one: Candidate) -> list[str]:
        """For each of the bounds LEFT, KEPT and ASKED, the figure in percent where a candidate breaks it; else ""."""
        left = 1 - self.all.estimate("erased", one).value
        near, attributes = self.estimate("near", one).value, self.estimate("attributes", one).value
        return [
            f"{100 * left:.1f}" if left > LEFT + self.chance else "",
            f"{100 * near:.1f}" if near < KEPT * self.before["near"] else "",
            f"{100 * attributes:.1f}" if attributes < ASKED * self.before["attributes"] else "",
        ]


def bounds(suites: Mapping[str, Mapping[str, Outcome]]) -> str:
    """How many targets of each suite keep each bound, and which do not, by candidate."""
    rows = []
    for name, own in suites.items():
        candidates = next(iter(own.values())).candidates if own else ()
        for one in candidates:
            broken = {target: each.broken(one) for target, each in own.items()}
            cells = []
            for place in range(3):
                bad = [f"{target} {value[place]}" for target, value in broken.items() if value[place]]
                cells.append(f"{len(broken) - len(bad)} of {len(broken)}" + (f"; not {', '.join(bad)}" if bad else ""))
            rows.append([name, way(one), *cells])
    return markdown(["suite", "by", "target erased", "near kept", "attributes kept"], rows)


def way(one: Candidate) -> str:
    """In what a candidate differs from the defaults."""
    return changes(one, {}) or "defaults"


def outcomes(suite: Suite, records: Records, results: Results | None) -> dict[str, Outcome]:
    """The targets with a complete seed, of the results of a suite's records."""
    if results is None:
        return {}
    there = {target for target, _, _ in complete(results.runs, results.sample.candidates)}
    own = suite.current(records)
    found = {}
    for target, _ in results.comparison.pairs:
        if target in there:
            before = own.found.get(before_name(target), {"judged": []})
            found[target] = Outcome(results, target, tuple(map(Judged.from_dict, before["judged"])))
    return found


def compared(results: Results) -> str:
    """How many pairs of target and seed the figures cover, unless they cover all."""
    made = len({(target, seed) for target, _, seed in complete(results.runs, results.sample.candidates)})
    wanted = len(results.comparison.pairs) * len(results.comparison.seeds)
    if made == wanted:
        return ""
    return f"So far {made} of {wanted} pairs of target and seed are complete. The figures cover these pairs only."
