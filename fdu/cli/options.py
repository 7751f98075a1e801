"""Unknown commands and options: refused in one line, with the closest match."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Collection, Mapping, Sequence

from fdu.cli.settings import Settings

OTHER_NAMES = {
    "steps": "max_train_steps",
    "num_train_steps": "max_train_steps",
    "iterations": "max_train_steps",
    "lr": "learning_rate",
    "batch_size": "train_batch_size",
    "method": "train_method",
    "loss": "divergence",
    "concept": "target",
    "output": "out",
    "output_dir": "out",
    "size": "resolution",
    "type": "concept_type",
}
"""Names of options in other programs."""


def check_typed(arguments: Sequence[str], commands: Mapping[str, type]) -> None:
    """Raise ValueError for an unknown command, an unknown option, and names that follow one that an option takes."""
    command, *rest = arguments
    if command.startswith("-"):
        return
    if command not in commands:
        hint = _meant(command, commands)
        raise ValueError(f"there is no command {command!r}{hint}; the commands are {', '.join(commands)}")
    options, repeated = _options(commands[command])
    for i, word in enumerate(rest):
        if not word.startswith("--") or word == "--":
            continue
        typed = word[2:].partition("=")[0]
        name = typed.replace("-", "_")
        if name not in (*options, "help"):
            hint = _meant(name, options, "--")
            raise ValueError(f"there is no option --{typed}{hint}; fdu {command} --help lists the options")
        values = list(itertools.takewhile(lambda value: not value.startswith("--"), rest[i + 1 :]))
        # The model may come last: it is the first word otherwise.
        if name in repeated and "=" not in word and len(values) > 1 and not rest[0].startswith("-"):
            again = " ".join(f"--{typed} {value}" for value in values)
            raise ValueError(f"--{typed} takes one name; repeat the option for each further name: {again}")


def _options(command: type) -> tuple[set[str], set[str]]:
    """The names of a command's options, and which of them can be repeated."""
    names, repeated = set(), set()
    for field in dataclasses.fields(command):
        made_by = field.default_factory
        if isinstance(made_by, type) and issubclass(made_by, Settings):
            names |= set(made_by().typed())
        else:
            names.add(field.name)
        if "UseAppendAction" in str(field.type):
            repeated.add(field.name)
    return names, repeated


def _meant(typed: str, known: Collection[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(typed, known, n=1, cutoff=0.5)
    best = OTHER_NAMES.get(typed) if OTHER_NAMES.get(typed) in known else next(iter(close), None)
    return f"; did you mean {prefix}{best}?" if best else ""
