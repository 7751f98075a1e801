"""Output shared by several commands."""

from __future__ import annotations

from collections.abc import Sequence

import fdu


def print_evaluation(evaluation: fdu.Evaluation, probes: Sequence[fdu.Probe]) -> None:
    """The tables of an evaluation, and its verdict in a line."""
    from fdu.evaluation.verdict import distance_table, judge, table

    print(f"\n{table(evaluation, probes)}")
    if evaluation.features:
        print(f"\nImages after against before, in the features of {evaluation.features}:\n{distance_table(evaluation)}")
    print(f"\n{judge(evaluation, probes).headline}.")
