"""What several commands print."""

from __future__ import annotations

from collections.abc import Sequence

import fdu


def print_evaluation(evaluation: fdu.Evaluation, probes: Sequence[fdu.Probe]) -> None:
    """The table of an evaluation, and its verdict in a line."""
    from fdu.verdict import judge, table

    print(f"\n{table(evaluation, probes)}\n\n{judge(evaluation, probes).headline}.")
