"""Data from JSON as dataclasses, checked."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


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
            raise ValueError(f"{where} must be one of {', '.join(map(str, arguments))}, got {value!r}")
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
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(one.__name__ for one in kinds)
        shown = repr(value)
        raise ValueError(f"{where} must be {wanted}, got {shown if len(shown) < 40 else type(value).__name__}")
    return value
