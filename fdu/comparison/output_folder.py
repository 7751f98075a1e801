"""The folder of a comparison: its files, and the checks before resuming it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fdu.comparison.plan import Comparison
from fdu.config import PLACES
from fdu.storage.output import SMALL_RESULT, check_output, write_json

RECORD = "comparison.json"
"""What the folder was begun for, and in the end what came out."""
RUNS, CACHE = "runs.jsonl", "cache"
"""The records, and the data that runs share, which a later call can make again."""


def check_folder(folder: Path, comparison: Comparison) -> None:
    """Refuse a folder that a comparison of this kind can neither begin nor go on with. Changes nothing.

    It may go on with other divergences, values of s0 and seeds: what is there already serves both.

    Raises:
        FileExistsError: it holds anything else, or a comparison on another model or with other settings.
        ValueError, OSError: of :func:`fdu.storage.output.check_output`.
    """
    begun = _read(folder / RECORD)
    if begun is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(
                f"output folder {str(folder)!r} holds {min(path.name for path in folder.iterdir())!r} and no "
                f"{RECORD} of a comparison; choose another with --out"
            )
        check_output(folder, needed_bytes=SMALL_RESULT)
        return
    wanted, found = _flat(common(comparison)), _flat(begun)
    for name, value in wanted.items():
        # A setting that did not exist then cannot be told; the records of the runs decide.
        if name in found and found[name] != value:
            raise FileExistsError(
                f"output folder {str(folder)!r} holds a comparison with {name} {found[name]!r}, not {value!r}; "
                "choose another with --out, or use its settings"
            )


def write_record(folder: Path, comparison: Comparison, command: str, results: dict[str, Any] | None = None) -> None:
    """Note what the folder is for, and what came out if anything did yet; whole or not at all."""
    write_json(folder / RECORD, {"common": common(comparison), "command": command, "results": results})


def common(comparison: Comparison) -> dict[str, Any]:
    """What all runs of a folder have in common, ready for JSON."""
    varied = {"divergence", "s0", "seed", *(name for one in comparison.candidates for name, _ in one.others), *PLACES}
    settings = {name: value for name, value in comparison.base.as_dict().items() if name not in varied}
    about = {"model": comparison.model, "pairs": [list(pair) for pair in comparison.pairs]}
    about |= {"concept_type": comparison.concept_type, **comparison.conditions()}
    return json.loads(json.dumps({**about, "settings": settings}))


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """The entries of a dict and of the dicts in it, by their own names."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _read(path: Path) -> dict[str, Any] | None:
    """The ``common`` of a record; None if there is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = record.get("common") if isinstance(record, dict) else None
    return found if isinstance(found, dict) else None
