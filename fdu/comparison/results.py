"""The results of a comparison: the figures of its candidates and the recommendations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdu.comparison.front import TARGET_ROLES, Sample, Standing, complete
from fdu.comparison.judged import Judged
from fdu.comparison.plan import Candidate, Comparison
from fdu.comparison.recommendation import BETA, Preference, Recommendation, recommend
from fdu.comparison.runs import read_before, read_record
from fdu.comparison.sweep import Records

JudgedRuns = dict[tuple[str, Candidate, int], tuple[Judged, ...]]


@dataclasses.dataclass(frozen=True)
class Results:
    """The content of a comparison's page."""

    comparison: Comparison
    runs: JudgedRuns
    """The judge's answers for each finished run."""
    failed: dict[str, str]
    """Runs whose loss became NaN or infinite, with the message."""
    missing: int
    """Number of runs without a record."""
    before: dict[str, tuple[float, float]]
    """By target: shares drawn as asked before any erasure, of the target and of the other classes."""
    sample: Sample
    """The figures of the candidates without a failed run, on the seeds that all of them share."""
    standings: tuple[Standing, ...]
    recommendations: dict[Preference, Recommendation]
    conditions: dict[str, Any]
    """Device and versions of the records; several are joined as "first; second"."""
    mixed: tuple[str, ...]
    """Conditions that differ between records: "device", or names of packages."""
    seconds: float
    """Mean seconds per erasure."""
    core_seconds: float
    """Mean cost of a run with its judging, in core seconds."""

    @property
    def mixed_note(self) -> str:
        """A warning if the records were made under different conditions; otherwise empty."""
        if not self.mixed:
            return ""
        return (
            f"The records were made under different conditions ({', '.join(self.mixed)}), which may explain some "
            "differences between candidates."
        )


def read_results(comparison: Comparison, path: Path) -> Results:
    """Read the records in a JSON Lines file.

    Raises:
        ValueError: too few to compare.
    """
    records = Records(path)
    found = {run: read_record(comparison, records, run) for run in comparison.runs()}
    there = {run: record for run, record in found.items() if record is not None}
    failed = {run.name: record["failed"] for run, record in there.items() if "failed" in record}
    lost = {run.candidate for run in there if run.name in failed}
    judged = {run: record for run, record in there.items() if "failed" not in record}
    runs = {
        (run.target, run.candidate, run.seed): tuple(map(Judged.from_dict, record["judged"]))
        for run, record in judged.items()
    }
    candidates = [one for one in comparison.candidates if one not in lost]
    compared = complete(runs, candidates)
    if not compared:
        problem = (
            "every candidate has a run whose loss became NaN or infinite" if not candidates else "no seed is complete"
        )
        raise ValueError(
            f"nothing to compare yet: {problem} ({len(there)} of {len(found)} records exist); "
            + ("lower s0 or learning_rate" if not candidates else "finish the runs first")
        )
    sample = Sample(compared, candidates)
    before_it = {target: read_before(comparison, records, target) for target, _ in comparison.pairs}
    before = {
        target: shares(tuple(map(Judged.from_dict, record["judged"])))
        for target, record in before_it.items()
        if record is not None
    }
    conditions, mixed = conditions_of([*judged.values(), *(one for one in before_it.values() if one is not None)])
    drawn = {target: own for target, (own, _) in before.items()}
    return Results(
        comparison=comparison,
        runs=runs,
        failed=failed,
        missing=len(found) - len(there),
        before=before,
        sample=sample,
        standings=tuple(sample.standings()),
        recommendations={prefer: recommend(sample, prefer, drawn) for prefer in BETA},
        conditions=conditions,
        mixed=mixed,
        seconds=sum(record["seconds"] for record in judged.values()) / len(judged),
        core_seconds=sum(record["core_seconds"] for record in judged.values()) / len(judged),
    )


def conditions_of(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Device and versions of the records, and the names of those that differ."""
    devices = dict.fromkeys(str(record["device"]) for record in records)
    versions: dict[str, dict[str, None]] = {}
    for name in dict.fromkeys(name for record in records for name in record["versions"]):
        versions[name] = dict.fromkeys(str(record["versions"].get(name, "none")) for record in records)
    mixed = [*(["device"] if len(devices) > 1 else []), *(name for name, found in versions.items() if len(found) > 1)]
    conditions = {
        "device": "; ".join(devices),
        "versions": {name: "; ".join(found) for name, found in versions.items()},
    }
    return conditions, tuple(mixed)


def shares(judged: tuple[Judged, ...]) -> tuple[float, float]:
    """Mean shares of images that show what was asked for, of the target and of the other classes."""
    own = [sum(one.hits) / len(one.hits) for one in judged if one.role in TARGET_ROLES]
    others = [sum(one.hits) / len(one.hits) for one in judged if one.role not in TARGET_ROLES]
    return sum(own) / len(own), sum(others) / len(others)
