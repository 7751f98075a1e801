"""What a run leaves in metrics.json: read, and refused where it is wrong or does not fit together."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdu.evaluation import Evaluation, Group, Role, Sampling
from fdu.evaluation.robustness import Robustness
from fdu.models.loading import RECORD_KEYS
from fdu.report.reading import restored
from fdu.storage.output import METRICS_FILE, METRICS_KEYS, RECORD_FILE

SHOWN = 8
"""Images a class that the page shows on either side, and the folder keeps."""
SIDES = ("before", "after")
GIVE = "give the folder that `fdu evaluate --out` or `fdu demo` wrote"


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How the images of a run were drawn and judged; what is not known is empty."""

    seed: int | None = None
    """Of the first image of every class."""
    sampling: Sampling | None = None
    judge: str = ""
    """Who told what the images show, in words."""
    dtype: str = ""
    """Of the pipeline's weights."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """:func:`fdu.storage.versions.versions` where it was evaluated."""


@dataclasses.dataclass(frozen=True)
class Class:
    """One probe, as the metrics tell it."""

    name: str
    role: Role
    group: Group
    prompts: tuple[str, ...]
    seen: dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Told:
    """What the metrics hold beside the evaluation."""

    probes: list[Class]
    record: dict[str, Any] | None
    command: str
    device: str
    notes: tuple[str, ...]
    robustness: Robustness | None = None
    conditions: Conditions = dataclasses.field(default_factory=Conditions)


@dataclasses.dataclass(frozen=True)
class _Course:
    """What the page takes of a record beside RECORD_KEYS."""

    history: dict[str, list[float]]
    versions: dict[str, str]
    command: str = ""
    fingerprint: str | None = None
    concepts: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Refuse a record of an erasure that the page could not tell.

    Args:
        record: :meth:`fdu.ErasureResult.record`, or what was read of ``fdu.json``.
        where: what holds it, for messages.

    Raises:
        ValueError: something is missing or wrong; names the place.
    """
    for key, types in RECORD_KEYS.items():
        entry: Any = record
        for name in key.split("."):
            entry = entry.get(name) if isinstance(entry, dict) else None
        if not isinstance(entry, types):
            raise ValueError(f"{where}.{key} is missing or wrong")
    restored(_Course, record, where)


def check_counts(evaluation: Evaluation, probes: Sequence[Class]) -> None:
    """Refuse figures and probes that do not belong together, and shares that are none."""
    shown = min(SHOWN, evaluation.images_per_class)
    for one in probes:
        counts = [len(one.seen.get(side, ())) for side in SIDES]
        if shown < 1 or counts != [shown] * len(SIDES):
            raise ValueError(f"the judge's words for {one.name!r} must be {shown} before and after, got {counts}")
    sides = (evaluation.before, evaluation.after)
    for side in sides:
        several = [
            share for one in (side.per_class, side.target_became, side.retained_by_group) for share in one.values()
        ]
        single = (side.target_accuracy, side.unseen_accuracy, side.retained_accuracy, side.cross_domain_accuracy)
        shares = [*several, *(share for share in single if share is not None)]
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError("a share is not in [0, 1]")
        lacking = {one.name for one in probes if one.role != "unseen"} | {side.worst_retained_class}
        if not side.per_class.keys() >= lacking:
            raise ValueError(f"per_class lacks {sorted(lacking - side.per_class.keys())[0]!r}")
    roles = {one.role for one in probes}
    for role, figure in (("unseen", "unseen_accuracy"), ("cross_domain", "cross_domain_accuracy")):
        if any((getattr(side, figure) is not None) != (role in roles) for side in sides):
            raise ValueError(f"{figure} does not fit the probes")
    if sides[0].retained_by_group.keys() != sides[1].retained_by_group.keys():
        raise ValueError("retained_by_group does not hold the same before and after")


def check_run(folder: str | Path) -> None:
    """Refuse a folder of which no report can be made.

    Raises:
        FileNotFoundError, ValueError: as :meth:`EvaluatedRun.read`.
        PermissionError: nothing can be written there.
    """
    metrics = read_metrics(Path(folder))
    if "probes" not in metrics:
        raise ValueError(
            f"RUN {str(folder)!r} was written by an earlier version of fdu, which kept no images; evaluate anew"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"RUN {str(folder)!r} cannot be written; copy it to a place of your own")


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics.json of a run's folder.

    Raises:
        FileNotFoundError: the folder, or the file in it, is not there.
        ValueError: it is not JSON, or not an evaluation.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"RUN {str(folder)!r} is no folder; {GIVE}")
        if (folder / RECORD_FILE).is_file():
            raise FileNotFoundError(
                f"RUN {str(folder)!r} holds an erasure that nobody has judged; first `fdu evaluate BASE {folder} --out "
                "DIR`, then `fdu report DIR`"
            )
        raise FileNotFoundError(f"RUN {str(folder)!r} holds no {METRICS_FILE}; {GIVE}")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}); evaluate anew") from error
    if not isinstance(metrics, dict) or not metrics.keys() >= METRICS_KEYS:
        raise ValueError(f"{str(path)!r} is not an evaluation of fdu; {GIVE}")
    return metrics
