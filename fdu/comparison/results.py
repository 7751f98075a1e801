"""The folder of a comparison: the check before it is written, and the results of its records."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdu.comparison.front import ATTACKED, FIGURES, TARGET_ROLES, Judged, Sample, Standing, complete
from fdu.comparison.plan import Candidate, Comparison
from fdu.comparison.recommendation import Preference, Recommendation, preferences, recommend
from fdu.comparison.runs import BEFORE, before_name, identity_before, identity_of
from fdu.comparison.sweep import Record, Records
from fdu.config import PLACES, updated
from fdu.storage.locks import contents
from fdu.storage.output import SMALL_RESULT, check_output, to_json, write_json

RECORD = "comparison.json"
"""The settings of the comparison, and its results once there are some."""
RUNS, CACHE = "runs.jsonl", "cache"
"""The records, and the data that runs share, which a later call can make again."""
FORMER_RUNS = "runs"
"""The folder in which earlier versions of fdu stored one JSON file per run."""

JudgedRuns = dict[tuple[str, Candidate, int], tuple[Judged, ...]]


@dataclasses.dataclass(frozen=True)
class Results:
    """The content of a comparison's page."""

    comparison: Comparison
    runs: JudgedRuns
    """The judge's view of each finished run."""
    failed: dict[str, str]
    """Runs whose loss became NaN or infinite, with the message."""
    missing: int
    """Number of runs without a record."""
    before: dict[str, tuple[float, float, float]]
    """By target, before any erasure: shares of images that show the requested class, of the target and of the other
    classes, and the share of what else the target's prompts ask for that was found, NaN if they ask for nothing."""
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
    pictured: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    """By target: class and prompt of each stored picture."""

    @property
    def mixed_note(self) -> str:
        """A warning if the records were made under different conditions; otherwise empty."""
        if not self.mixed:
            return ""
        return (
            f"The records were made under different conditions ({', '.join(self.mixed)}), which may explain some "
            "differences between candidates."
        )


def read_results(comparison: Comparison, records: Records) -> Results:
    """The results of a comparison's records.

    Raises:
        ValueError: too few to compare.
    """
    found = {run: records.of(run.name, identity_of(comparison, run)) for run in comparison.runs()}
    there = {run: record for run, record in found.items() if record is not None}
    failed = {run.name: record["failed"] for run, record in there.items() if "failed" in record}
    finished = {run: record for run, record in there.items() if "failed" not in record}
    runs = {
        (run.target, run.candidate, run.seed): tuple(
            one for one in _judged(record) if comparison.attacked or one.role != ATTACKED
        )
        for run, record in finished.items()
    }
    lost = {run.candidate for run in there if run.name in failed}
    candidates = [one for one in comparison.candidates if one not in lost]
    compared = complete(runs, candidates)
    if not compared:
        problem, remedy = "no seed is complete", "finish the runs first"
        if not candidates:
            problem = "every candidate has a run whose loss became NaN or infinite"
            remedy = "lower s0 or learning_rate"
        raise ValueError(f"nothing to compare yet: {problem} ({len(there)} of {len(found)} records exist); {remedy}")
    sample = Sample(compared, candidates)
    targets = [target for target, _ in comparison.pairs]
    drawn = {target: records.of(before_name(target), identity_before(comparison, target)) for target in targets}
    drawn_records = {target: record for target, record in drawn.items() if record is not None}
    before = {target: shares(_judged(record)) for target, record in drawn_records.items()}
    conditions, mixed = conditions_of([*finished.values(), *drawn_records.values()])
    target_shares = {target: own for target, (own, _, _) in before.items()}
    return Results(
        comparison=comparison,
        runs=runs,
        failed=failed,
        missing=len(found) - len(there),
        before=before,
        sample=sample,
        standings=tuple(sample.standings()),
        recommendations={prefer: recommend(sample, prefer, target_shares) for prefer in preferences(sample)},
        conditions=conditions,
        mixed=mixed,
        seconds=sum(record["seconds"] for record in finished.values()) / len(finished),
        core_seconds=sum(record["core_seconds"] for record in finished.values()) / len(finished),
        pictured={
            target: [(name, prompt) for name, prompt in record.get("pictured", ())]
            for target, record in drawn_records.items()
        },
    )


def conditions_of(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Device and versions of the records, and the names of those that differ."""
    devices = dict.fromkeys(str(record["device"]) for record in records)
    versions: dict[str, dict[str, None]] = {}
    for name in dict.fromkeys(name for record in records for name in record["versions"]):
        versions[name] = dict.fromkeys(str(record["versions"].get(name, "none")) for record in records)
    mixed = tuple(name for name, found in {"device": devices, **versions}.items() if len(found) > 1)
    joined = {name: "; ".join(found) for name, found in versions.items()}
    return {"device": "; ".join(devices), "versions": joined}, mixed


def shares(judged: tuple[Judged, ...]) -> tuple[float, float, float]:
    """Mean shares of images that show the requested class, of the target and of the other classes, and the share of
    what else the target's prompts ask for that was found; NaN if they ask for nothing."""
    own = [sum(one.hits) / len(one.hits) for one in judged if one.role in TARGET_ROLES]
    others = [sum(one.hits) / len(one.hits) for one in judged if one.role not in (*TARGET_ROLES, ATTACKED)]
    answers = [answer for one in judged for found in one.attributes.values() for answer in found if answer is not None]
    found = sum(answers) / len(answers) if answers else math.nan
    return sum(own) / len(own), sum(others) / len(others), found


def check_folder(folder: Path, comparison: Comparison) -> None:
    """Refuse a folder that this comparison can neither start nor resume in. Changes nothing.

    Other divergences, values of s0 and seeds are no obstacle: finished runs serve both.

    Raises:
        FileExistsError: it holds anything else, or a comparison of another model or with other settings.
        ValueError, OSError: as :func:`fdu.storage.output.check_output`.
    """
    begun = _read(folder / RECORD)
    if begun is None:
        if folder.is_dir() and (others := contents(folder)):
            raise FileExistsError(
                f"output folder {str(folder)!r} holds {others[0]!r} and no {RECORD} of a comparison; choose another "
                "with --out"
            )
        check_output(folder, needed_bytes=SMALL_RESULT)
        return
    wanted, found = (
        _flat(common(comparison)),
        {"quantization": "none", "variant": None, "base_lora": [], **_flat(begun)},
    )
    for name, value in wanted.items():
        # A file of an earlier version may lack a setting; then the records of the runs decide.
        if name in found and found[name] != value:
            raise FileExistsError(
                f"output folder {str(folder)!r} holds a comparison with {name} {found[name]!r}, not {value!r}; "
                "choose another with --out, or use its settings"
            )


def write_record(folder: Path, comparison: Comparison, command: str, results: Results | None = None) -> None:
    """Write the settings of the comparison and its results, if there are some yet; whole or not at all."""
    found = None if results is None else describe(results)
    write_json(folder / RECORD, {"common": common(comparison), "command": command, "results": found})


def describe(results: Results) -> dict[str, Any]:
    """The figures and the recommendations, ready for JSON."""
    return {
        "candidates": [
            {**one.candidate.told, **{name: dataclasses.asdict(getattr(one, name)) for name in FIGURES}}
            | {"on_front": one.on_front, "front_share": one.front_share}
            for one in results.standings
        ],
        "recommendations": {
            prefer: {"settings": one.candidate.settings, "certain": one.certain, "why": [one.headline, *one.sentences]}
            for prefer, one in results.recommendations.items()
        },
        "failed": results.failed,
        "prompts": results.comparison.origin,
        **results.conditions,
        "mixed": list(results.mixed),
    }


def former_runs(folder: Path) -> int:
    """The number of runs that an earlier version of fdu stored here, in a form that this version cannot read."""
    names = [path.name for path in (folder / FORMER_RUNS).glob("*.json")]
    return 0 if (folder / RUNS).exists() else sum(not name.startswith(f"{BEFORE}_") for name in names)


def common(comparison: Comparison) -> dict[str, Any]:
    """Everything that all runs of a folder share, ready for JSON."""
    varied = {*comparison.varied, *PLACES}
    settings = {name: value for name, value in comparison.base.as_dict().items() if name not in varied}
    names = ("model", "pairs", "concept_type", "quantization", "variant", "base_lora")
    about = {name: getattr(comparison, name) for name in names}
    return json.loads(to_json({**about, **comparison.conditions(), "settings": settings}))


def _judged(record: Record) -> tuple[Judged, ...]:
    return tuple(map(Judged.from_dict, record["judged"]))


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """The entries of a dict and of the dicts in it, by their own names."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _read(path: Path) -> dict[str, Any] | None:
    """The settings in the file of a comparison; None if it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["common"]
        return {**found, "settings": updated(found.get("settings", {}))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
