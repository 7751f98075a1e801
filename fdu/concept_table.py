"""Tables of concepts: targets and anchors in a CSV or YAML file, as many as a thousand."""

from __future__ import annotations

import csv
import dataclasses
import re
import reprlib
from pathlib import Path
from typing import Any, get_args

from fdu.concepts import Concept, ConceptType
from fdu.config import check_choice, closest
from fdu.storage.foreign import parse_yaml

COLUMNS = ("target", "anchor", "type", "weight", "prompts", "anchor_prompts")
"""The columns of a table of concepts."""
NEEDED, LISTS = ("target", "anchor"), frozenset({"prompts", "anchor_prompts"})
TABLES = (".csv", ".yaml", ".yml")
Row = dict[str, Any]
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclasses.dataclass(frozen=True)
class ConceptTable:
    """The concepts in a file, one per row."""

    targets: tuple[Concept, ...]
    anchors: tuple[Concept, ...]
    types: tuple[ConceptType, ...]

    @classmethod
    def read(cls, path: str | Path) -> ConceptTable:
        """Read a table of concepts.

        Its columns are those of ``COLUMNS``, of which target and anchor are needed. In CSV the first line names them,
        and | separates prompts. In YAML the file is a list with one mapping per concept, and prompts are lists. An
        empty anchor is nothing.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, an unknown column, or a row that is wrong; names the file and the row.
        """
        path = Path(path)
        shown = f"concepts {str(path)!r}"
        if path.suffix not in TABLES:
            raise ValueError(f"{shown} must end in {', '.join(TABLES)}; a .txt file of prompts is a --target")
        if not path.is_file():
            raise FileNotFoundError(f"{shown} does not exist")
        try:
            rows = _csv_rows(path) if path.suffix == ".csv" else _yaml_rows(path)
        except UnicodeDecodeError as error:
            raise ValueError(f"{shown} is not text in UTF-8 ({error}); save it as UTF-8") from error
        except ValueError as error:
            raise ValueError(f"{shown}: {error}") from error
        if not rows:
            raise ValueError(f"{shown} holds no concept; write one per row, with target and anchor")
        found = []
        for number, row in rows:
            try:
                found.append(_table_row(row))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{shown}, {'line' if path.suffix == '.csv' else 'entry'} {number}: {error}"
                ) from error
        return cls(*map(tuple, zip(*found, strict=True)))


def _csv_rows(path: Path) -> list[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, skipinitialspace=True, strict=True)
        try:
            lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} is not CSV ({error})") from error
    lines = [(number, cells) for number, cells in lines if any(cells)]
    header = lines[0][1] if lines else []
    header = [name.lower() for name in header]
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise ValueError(f"the first line names the column {twice[0]!r} twice")
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise ValueError(
            f"the first line names no column {missing[0]!r}; it must name target and anchor, with commas between them"
        )
    rows = []
    for number, cells in lines[1:]:
        if len(cells) > len(header):
            raise ValueError(
                f"line {number} has {len(cells)} cells, the first line {len(header)}; quote what has commas"
            )
        row: Row = {name: cell for name, cell in zip(header, cells, strict=False) if cell or name in NEEDED}
        for name in LISTS.intersection(row):
            row[name] = [prompt.strip() for prompt in row[name].split("|") if prompt.strip()]
        rows.append((number, row))
    return rows


def _yaml_rows(path: Path) -> list[tuple[int, Row]]:
    content = parse_yaml(path.read_text(encoding="utf-8"))
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise ValueError('it must be a list with one entry per concept, such as "- {target: fox, anchor: wolf}"')
    return list(enumerate(content, 1))


def _table_row(row: Row) -> tuple[Concept, Concept, ConceptType]:
    """Target, anchor and type of a row."""
    for name in row:
        if name not in COLUMNS:
            raise ValueError(f"there is no column {name!r}{closest(str(name), COLUMNS)}")
    for name in NEEDED:
        if name not in row:
            raise ValueError(f"{name} is missing")
        if not isinstance(row[name], str):
            raise ValueError(f"{name} must be a text, got {reprlib.repr(row[name])}; put it into quotes")
    for name in LISTS.intersection(row):
        if not isinstance(row[name], list) or not all(isinstance(one, str) for one in row[name]):
            raise ValueError(f"{name} must be a list of texts, got {reprlib.repr(row[name])}")
    if not row["target"].strip():
        raise ValueError("target is empty")
    prompts, anchor_prompts = (tuple(row.get(name, ())) for name in ("prompts", "anchor_prompts"))
    if anchor_prompts and not prompts:
        raise ValueError("anchor_prompts need prompts beside them, one for each")
    kind, weight = row.get("type", "object"), row.get("weight", 1.0)
    check_choice("type", kind, get_args(ConceptType))
    if isinstance(weight, str) and NUMBER.fullmatch(weight):
        weight = float(weight)
    target = Concept(row["target"].strip(), prompts, weight)
    return target, Concept(row["anchor"].strip(), anchor_prompts), kind
