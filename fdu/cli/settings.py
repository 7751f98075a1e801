"""The settings of an erasure as groups of options, and the help of all options."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import cache
from typing import Annotated, Any, get_type_hints

import tyro

from fdu.config import EraseConfig

GROUPS = {
    "basic": "train_method",
    "divergence": "divergence",
    "training": "gradient_accumulation_steps",
    "memory": "mixed_precision",
    "files": "cache_dir",
}
"""The groups of settings in the help, each with its first setting in the order of EraseConfig."""


class Settings:
    """The settings as typed: a dataclass with one dataclass per group. See :func:`grouped`."""

    def typed(self) -> dict[str, Any]:
        """Every setting by name."""
        return {name: value for group in vars(self).values() for name, value in vars(group).items()}

    def checked(self, **others: Any) -> EraseConfig:
        """The settings, checked; ``others`` replace those that are None.

        Raises:
            ValueError, TypeError: as :class:`fdu.EraseConfig`.
        """
        typed = self.typed()
        return EraseConfig(**typed | {name: value for name, value in others.items() if typed[name] is None})


@cache
def grouped(without: Collection[str] = ()) -> type[Settings]:
    """The class of the settings on a command line, all but those ``without``."""
    hints, help_texts, fields = get_type_hints(EraseConfig), helps(EraseConfig), EraseConfig.__dataclass_fields__
    groups = []
    starts = [*map(list(fields).index, GROUPS.values()), len(fields)]
    for title, start, end in zip(GROUPS, starts, starts[1:], strict=False):
        options = [
            (name, _option(hints[name], help_texts[name]), dataclasses.field(default=fields[name].default))
            for name in list(fields)[start:end]
            if name not in without
        ]
        if options:
            group = dataclasses.make_dataclass(title, options, frozen=True)
            groups.append((title, Annotated[group, tyro.conf.arg(help="")], dataclasses.field(default_factory=group)))
    return dataclasses.make_dataclass("Settings", groups, bases=(Settings,), frozen=True)


def described(command: type) -> type:
    """The command's dataclass with the help of its own options as tyro should print it."""
    hints, help_texts = get_type_hints(command, include_extras=True), helps(command)
    options = [
        (field.name, _option(hints[field.name], help_texts[field.name]), field)
        for field in dataclasses.fields(command)
        if field.name in help_texts
    ]
    namespace = {"__doc__": command.__doc__, "__module__": command.__module__}
    return dataclasses.make_dataclass(command.__name__, options, bases=(command,), namespace=namespace)


def helps(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass's fields say, each in one paragraph."""
    import docstring_parser

    found = docstring_parser.parse_from_object(kind).params
    return {one.arg_name: " ".join(one.description.split()) for one in found if one.description}


def _option(hint: Any, text: str) -> Any:
    """The hint with its help. tyro would keep a docstring's line breaks, and show None and False as defaults."""

    def default(label: str) -> str:
        return "" if label in ("", "None", "False") or "MISSING" in label else f"(default: {label})"

    return Annotated[hint, tyro.conf.arg(help=text, help_behavior_hint=default)]
