"""``fdu names``: what can be erased from a pipeline of fdu; and the completion of command lines in a shell.

``complete -o filenames -o default -C 'fdu names' fdu`` makes bash ask this command, and so does zsh after
``bashcompinit``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar

from tyro.conf import Positional

from fdu.cli.options import option_names
from fdu.subjects.embedded import EMBEDDED

LINE, POINT = "COMP_LINE", "COMP_POINT"
"""Where bash gives the command line to complete, and the place of the cursor in it."""


@dataclasses.dataclass
class Names:
    """List the concepts that can be erased from a pipeline of fdu.

    For completion in bash: complete -o filenames -o default -C 'fdu names' fdu
    """

    examples: ClassVar[tuple[str, ...]] = ("fdu names emoji", "complete -o filenames -o default -C 'fdu names' fdu")

    model: Positional[str] = EMBEDDED[0].name
    """The pipeline: emoji or digits."""

    def prepare(self, command: str) -> Callable[[], None]:
        """Check the arguments and return the work."""
        by_kind = names_of(self.model)
        if not by_kind:
            known = ", ".join(one.name for one in EMBEDDED)
            raise ValueError(f"MODEL {self.model!r} is no pipeline of fdu; choose one of {known}")

        def work() -> None:
            for kind, names in by_kind.items():
                print(f"{kind}: {', '.join(names)}")
            print(f"only as an anchor: {nothing_of(self.model)}")

        return work


def names_of(model: str) -> dict[str, tuple[str, ...]]:
    """What can be erased from a pipeline of fdu, by kind; empty for any other model."""
    return next((one().names() for one in EMBEDDED if one.name == model), {})


def nothing_of(model: str) -> str:
    """The anchor that names no concept of its own."""
    return next(one.nothing for one in EMBEDDED if one.name == model)


def complete(commands: Mapping[str, type]) -> bool:
    """Print the candidates for the word at the cursor, one a line, if a shell asks; whether it does."""
    if LINE not in os.environ:
        return False
    line = os.environ[LINE]
    print(*candidates(line[: int(os.environ.get(POINT, len(line)))], commands), sep="\n")
    return True


def candidates(line: str, commands: Mapping[str, type]) -> list[str]:
    """The words that may complete the last word of a command line: commands, models, options, and what they name."""
    _, *words = re.split(r"(?<!\\) +", line.lstrip())
    *before, word = words or [""]
    start = word.lstrip("'\"").replace("\\ ", " ")
    return sorted(name for name in _possible(before, commands) if name.startswith(start))


def _possible(before: list[str], commands: Mapping[str, type]) -> Collection[str]:
    """What may follow these words."""
    if not before:
        return commands
    if before[0] not in commands:
        return ()
    models = [one.name for one in EMBEDDED]
    named = next((one for one in before[1:] if one in models), models[0] if before[0] == "demo" else "")
    if before[-1] in ("--target", "--anchor"):
        names = [name for names in names_of(named).values() for name in names]
        return [*names, nothing_of(named)] if names and before[-1] == "--anchor" else names
    options, _, positional = option_names(commands[before[0]])
    if before[-1].startswith("--"):
        return ()  # a value of the option, or the next option: the shell offers files
    offered = [f"--{name}" for name in sorted(options - positional)]
    return [*models, *offered] if len(before) == 1 and positional & {"model", "base"} else offered
