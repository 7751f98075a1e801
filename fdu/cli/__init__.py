"""The command ``fdu``: each subcommand is a dataclass in its own file that checks its arguments, then works."""

from __future__ import annotations

from fdu.cli.exits import FAILED, INTERRUPTED, OK, USAGE
from fdu.cli.program import COMMANDS, EXAMPLES, main, parse

__all__ = ["COMMANDS", "EXAMPLES", "FAILED", "INTERRUPTED", "OK", "USAGE", "main", "parse"]
