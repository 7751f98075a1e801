"""Output shared by several commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import fdu

if TYPE_CHECKING:
    from fdu.evaluation.robustness import Robustness


def print_evaluation(evaluation: fdu.Evaluation, probes: Sequence[fdu.Probe]) -> None:
    """The tables of an evaluation, and its verdict in a line."""
    from fdu.evaluation.verdict import distance_table, judge, table

    print(f"\n{table(evaluation, probes)}")
    if evaluation.features:
        print(f"\nImages after against before, in the features of {evaluation.features}:\n{distance_table(evaluation)}")
    print(f"\n{judge(evaluation, probes).headline}.")


def print_robustness(robustness: Robustness, target: str) -> None:
    """Whether the erasure holds, in sentences."""
    from fdu.evaluation.robustness.holding import judge_robustness

    verdict = judge_robustness(robustness.as_dict(), target)
    print(f"\n{verdict.headline}.", *verdict.sentences, sep="\n  ")
