"""What became of one target: its seen and unseen phrasings, close and other classes, and what else was asked for."""

from __future__ import annotations

from experiment import embedded

from fdu.comparison.front import TARGET_ROLES, Estimate, Judged, Sample, complete
from fdu.comparison.page import percent
from fdu.comparison.plan import Candidate
from fdu.comparison.results import Results

FIGURES = ("erased, seen", "erased, unseen", "near", "far", "attributes", "change")
"""The columns of a table. Near are neighbours of the target, far all other classes that were drawn."""


class Outcome:
    """The figures of all candidates on one target.

    Args:
        results: those of a suite.
        target: one of its targets.

    Raises:
        ValueError: no seed of the target is complete.
    """

    def __init__(self, results: Results, target: str) -> None:
        self.candidates = results.sample.candidates
        finished = complete(results.runs, self.candidates)
        self.runs = {key: tuple(runs) for key, runs in finished.items() if key[0] == target}
        self.all = Sample(self.runs, self.candidates)
        anchor = dict(results.comparison.pairs)[target]
        probes = embedded(results.comparison.model).content.probes(target, anchor=anchor)
        self._near = {one.name for one in probes if one.role == "retained" and one.group == "near"}
        self._parts = {kind: self._only(kind) for kind in FIGURES[:4]}

    def _only(self, kind: str) -> Sample:
        """The figures of the probes of one kind."""

        def wanted(one: Judged) -> bool:
            if one.role in TARGET_ROLES:
                return kind == f"erased, {'seen' if one.role == 'target' else 'unseen'}"
            return kind == ("near" if one.name in self._near else "far")

        return Sample({key: tuple(filter(wanted, runs)) for key, runs in self.runs.items()}, self.candidates)

    def estimate(self, figure: str, one: Candidate) -> Estimate:
        """A figure of ``FIGURES`` with its interval."""
        if figure in self._parts:
            return self._parts[figure].estimate("erased" if figure.startswith("erased") else "retained", one)
        return self.all.estimate(figure, one)

    def cells(self, one: Candidate) -> list[str]:
        """All figures in percent, for a row of a table."""
        return [percent(self.estimate(name, one), 2 if name == "change" else 1) for name in FIGURES]


def outcomes(results: Results) -> dict[str, Outcome]:
    """The targets with a complete seed."""
    there = {target for target, _, _ in complete(results.runs, results.sample.candidates)}
    return {target: Outcome(results, target) for target, _ in results.comparison.pairs if target in there}
