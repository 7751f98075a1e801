"""Read metrics.json of a run, and refuse it if it is wrong or inconsistent."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fdu.evaluation import Evaluation, Group, Role, Sampling
from fdu.storage.output import METRICS_FILE, METRICS_KEYS, RECORD_FILE

SHOWN = 8
"""Images per class and side that the page shows and the folder stores."""
SIDES = ("before", "after")
GIVE = "give the folder that `fdu evaluate --out` or `fdu demo` wrote"


@dataclasses.dataclass(frozen=True)
class Conditions:
    """How the images of a run were drawn and judged; unknown fields are empty."""

    seed: int | None = None
    """Seed of the first image of every class."""
    sampling: Sampling | None = None
    judge: str = ""
    """The judge in words."""
    dtype: str = ""
    """Dtype of the pipeline's weights."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """:func:`fdu.storage.fingerprint.versions` of the machine that evaluated."""


@dataclasses.dataclass(frozen=True)
class Class:
    """One probe in the metrics."""

    name: str
    role: Role
    group: Group
    prompts: tuple[str, ...]
    """The first prompts."""
    seen: dict[str, list[str]]
    """By side, the judge's answer for each shown image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """The metrics without the evaluation."""

    probes: list[Class]
    record: dict[str, Any] | None = None
    """:meth:`fdu.ErasureResult.record`, or the ``fdu.json`` beside saved weights; without it the page has no training
    curves and no settings."""
    command: str = ""
    """The command line that reproduces this."""
    device: str = ""
    notes: tuple[str, ...] = ()
    """Closing paragraphs, such as the source of the data."""
    robustness: dict[str, Any] | None = None
    """:meth:`fdu.evaluation.robustness.Robustness.as_dict`, if the erasure was examined."""
    conditions: Conditions = dataclasses.field(default_factory=Conditions)


@dataclasses.dataclass(frozen=True)
class _Named:
    """A concept in a record."""

    name: str
    prompts: list[str]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Settings that the page uses."""

    divergence: str
    max_train_steps: int
    seed: int


@dataclasses.dataclass(frozen=True)
class _Record:
    """What is used of the record of an erasure."""

    target: _Named
    anchor: _Named
    config: _Settings
    sigma: float
    seconds: float
    history: dict[str, list[float]]
    versions: dict[str, str]
    command: str = ""
    fingerprint: str | None = None
    concepts: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def check_record(record: Any, where: str) -> None:
    """Refuse a record of an erasure that the page could not show.

    Args:
        record: the content of ``fdu.json``.
        where: its place, for error messages.

    Raises:
        ValueError: an entry is missing or wrong; names the place.
    """
    found = restored(_Record, record, where)
    if math.isnan(found.sigma + found.seconds):
        raise ValueError(f"{where}: sigma and seconds must be numbers")


def check_counts(evaluation: Evaluation, probes: Sequence[Class]) -> None:
    """Refuse figures that do not match the probes, and shares outside [0, 1]."""
    shown = min(SHOWN, evaluation.images_per_class)
    for one in probes:
        counts = [len(one.seen.get(side, ())) for side in SIDES]
        if shown < 1 or counts != [shown] * len(SIDES):
            raise ValueError(f"the judge's answers for {one.name!r} must be {shown} before and after, got {counts}")
    sides = (evaluation.before, evaluation.after)
    for side in sides:
        shares = [side.target_accuracy, side.unseen_accuracy, side.retained_accuracy, side.cross_domain_accuracy]
        for several in (side.per_class, side.target_became, side.retained_by_group):
            shares += several.values()
        if not all(share is None or 0 <= share <= 1 for share in shares):
            raise ValueError("a share lies outside [0, 1]")
        lacking = {one.name for one in probes if one.role != "unseen"} | {side.worst_retained_class}
        if not side.per_class.keys() >= lacking:
            raise ValueError(f"per_class lacks {sorted(lacking - side.per_class.keys())[0]!r}")
    roles = {one.role for one in probes}
    for role, figure in (("unseen", "unseen_accuracy"), ("cross_domain", "cross_domain_accuracy")):
        if any((getattr(side, figure) is not None) != (role in roles) for side in sides):
            raise ValueError(f"{figure} does not match the probes")
    if sides[0].retained_by_group.keys() != sides[1].retained_by_group.keys():
        raise ValueError("retained_by_group has different groups before and after")


def check_run(folder: str | Path) -> None:
    """Refuse a folder from which no report can be made.

    Raises:
        FileNotFoundError, ValueError: as :meth:`EvaluatedRun.read`.
        PermissionError: the folder cannot be written.
    """
    metrics = read_metrics(Path(folder))
    if "probes" not in metrics:
        raise ValueError(
            f"RUN {str(folder)!r} is from an earlier version of fdu, which stored no images; run `fdu evaluate` again"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"RUN {str(folder)!r} is not writable; copy it to a folder of your own")


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics.json of a run's folder.

    Raises:
        FileNotFoundError: the folder, or the file in it, does not exist.
        ValueError: it is not JSON, or not an evaluation.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"RUN {str(folder)!r} is not a folder; {GIVE}")
        if (folder / RECORD_FILE).is_file():
            raise FileNotFoundError(
                f"RUN {str(folder)!r} holds an erasure without an evaluation; run `fdu evaluate BASE {folder} --out "
                "DIR`, then `fdu report DIR`"
            )
        raise FileNotFoundError(f"RUN {str(folder)!r} has no {METRICS_FILE}; {GIVE}")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}); run `fdu evaluate` again") from error
    if not isinstance(metrics, dict) or not metrics.keys() >= METRICS_KEYS:
        raise ValueError(f"{str(path)!r} is not an evaluation by fdu; {GIVE}")
    return metrics


def restored(kind: Any, value: Any, where: str) -> Any:
    """The output of ``json.loads`` as a dataclass. Unknown keys are ignored; missing fields take their defaults.

    Args:
        kind: a dataclass of float, int, str, Literal, list, tuple, dict with names as keys, dataclasses and None.
        value: the data; null for a float is NaN, which JSON lacks.
        where: the place in the file, for error messages.

    Raises:
        ValueError: the data does not fit; names the place.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        (given,) = (one for one in arguments if one is not type(None))
        return None if value is None else restored(given, value, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        _checked(value, dict, where)
        hints, fields = get_type_hints(kind), dataclasses.fields(kind)
        for field in fields:
            if field.name not in value and field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where}.{field.name} is missing")
        names = [field.name for field in fields if field.name in value]
        return kind(**{name: restored(hints[name], value[name], f"{where}.{name}") for name in names})
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is none of {', '.join(map(str, arguments))}: {value!r}")
        return value
    if origin is dict:
        return {
            name: restored(arguments[1], one, f"{where}.{name}") for name, one in _checked(value, dict, where).items()
        }
    if origin in (list, tuple):
        members = _checked(value, (list, tuple), where)
        fixed = origin is tuple and arguments[-1] is not Ellipsis
        if fixed and len(members) != len(arguments):
            raise ValueError(f"{where} must hold {len(arguments)} entries, got {len(members)}")
        kinds = arguments if fixed else [arguments[0]] * len(members)
        return origin(restored(kinds[place], one, f"{where}[{place}]") for place, one in enumerate(members))
    if kind is float:
        return math.nan if value is None else _checked(value, (int, float), where)
    return _checked(value, kind, where)


def _checked(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        shown = repr(value)
        raise ValueError(f"{where} is wrong: {shown if len(shown) < 40 else type(value).__name__}")
    return value
