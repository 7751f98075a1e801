"""JSON, YAML and text of strangers: read whole, or refused in words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DEPTH = 64
"""The most levels of nested lists and objects; fdu writes ten."""
MOST_VALUES = 100_000
"""Of YAML, where a part that is named and repeated counts each time."""
LARGEST = 1 << 64
"""The largest whole number; seeds have 64 bits."""


def read_json(path: Path, remedy: str) -> Any:
    """The content of a JSON file. NaN and infinities, which JSON lacks, become null, which fdu writes for them.

    Args:
        path: the file.
        remedy: what to do if it cannot be read, for the error.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not JSON in UTF-8, nests too deep, or holds numbers or text that no file of fdu holds.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
        _check(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({printable(str(error))}); {remedy}") from error
    return content


def parse_yaml(text: str) -> Any:
    """The content of YAML, as yaml.safe_load reads it.

    Raises:
        ValueError: it is not YAML, nests too deep, repeats itself into too many values, or holds numbers or text that
            no file of fdu holds.
    """
    import yaml

    try:
        content = yaml.safe_load(text)
        _check(content, MOST_VALUES)
    except Exception as error:  # on tags that do not fit their values, PyYAML raises errors of every kind
        raise ValueError(f"it is not YAML ({printable(' '.join(str(error).split()))})") from error
    return content


def printable(text: str) -> str:
    """A text without the characters that change how a terminal shows others; these are escaped.

    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _check(content: Any, most: float = math.inf) -> None:
    waiting, visited = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        visited += 1
        if visited > most:
            raise ValueError(f"it holds more than {most} values")
        if depth > DEPTH:
            raise ValueError(f"it nests deeper than {DEPTH} levels")
        if isinstance(value, dict):
            waiting += [(one, depth + 1) for pair in value.items() for one in pair]
        elif isinstance(value, list):
            waiting += [(one, depth + 1) for one in value]
        elif isinstance(value, str):
            value.encode("utf-8")  # JSON can spell halves of characters, which no page can hold
        elif abs(value) > LARGEST if isinstance(value, int) else isinstance(value, float) and not math.isfinite(value):
            raise ValueError("it holds a number that is too large")
