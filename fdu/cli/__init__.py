"""The command ``fdu``. Each subcommand is a dataclass that first checks its arguments, then works."""

from __future__ import annotations

from fdu.cli.program import COMMANDS, EXAMPLES, FAILED, INTERRUPTED, OK, USAGE, main, parse

__all__ = ["COMMANDS", "EXAMPLES", "FAILED", "INTERRUPTED", "OK", "USAGE", "main", "parse"]
