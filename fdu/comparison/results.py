"""What the records of a comparison say: the figures of its candidates, and what to take."""

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
    """Everything that the page of a comparison shows."""

    comparison: Comparison
    runs: JudgedRuns
    """What the judge saw in each run that is there and did not fail."""
    failed: dict[str, str]
    """The names of the runs whose loss became NaN or infinite, and what was said."""
    missing: int
    """Runs that have no record yet."""
    before: dict[str, tuple[float, float]]
    """By target: the shares that the model as it is draws as asked, of the target and of the other classes."""
    sample: Sample
    """The figures of the candidates without a failed run, on the seeds that all of them have."""
    standings: tuple[Standing, ...]
    recommendations: dict[Preference, Recommendation]
    conditions: dict[str, Any]
    """Device and versions of the records; where they differ, all there are: "first; second"."""
    mixed: tuple[str, ...]
    """What differs between records: "device", or the names of packages."""
    seconds: float
    """How long an erasure took, on average."""
    core_seconds: float
    """What a run cost with its judging, in seconds of one core, on average."""

    @property
    def mixed_note(self) -> str:
        """That records were made in several places, if they were; else nothing."""
        if not self.mixed:
            return ""
        return (
            f"Not all records were made under one condition ({', '.join(self.mixed)}); some of what candidates differ "
            "by may come from that."
        )


def read_results(comparison: Comparison, path: Path) -> Results:
    """Read the records in a JSON Lines file.

    Raises:
        ValueError: too few of them to compare anything.
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
        problem = "every candidate has a run whose loss became NaN or infinite" if not candidates else "no seed of all"
        raise ValueError(
            f"there is nothing to compare yet: {problem}, {len(there)} of {len(found)} records are there; "
            + ("lower s0 or the learning rate" if not candidates else "make the runs first")
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
    """Device and versions of records that may have been made in several places, and what of it differs."""
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
    """The mean shares drawn as asked, of the target and of the other classes."""
    own = [sum(one.hits) / len(one.hits) for one in judged if one.role in TARGET_ROLES]
    others = [sum(one.hits) / len(one.hits) for one in judged if one.role not in TARGET_ROLES]
    return sum(own) / len(own), sum(others) / len(others)
