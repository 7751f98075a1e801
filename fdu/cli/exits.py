"""The exit codes of the command ``fdu``."""

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""Done; a run failed; wrong arguments, nothing was done; Ctrl-C."""
