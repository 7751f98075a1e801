"""The metrics. A new one is a file next to this one and a line in ``METRICS``."""

from __future__ import annotations

from typing import TypeVar

from fdu.evaluation.metrics.clip_score import CLIP_SCORE
from fdu.evaluation.metrics.cmmd import CMMD
from fdu.evaluation.metrics.kid import KID
from fdu.evaluation.metrics.metric import Metric
from fdu.evaluation.metrics.perceptual import PERCEPTUAL
from fdu.evaluation.metrics.pixels import PIXELS
from fdu.evaluation.metrics.unlearn_canvas import CRA, IRA, UA

METRICS: list[Metric] = [CLIP_SCORE, KID, CMMD, PERCEPTUAL, PIXELS, UA, IRA, CRA]
"""All metrics, in the order of the tables."""
Kind = TypeVar("Kind", bound=Metric)


def metrics_of(*kinds: type[Kind]) -> list[Kind]:
    """The metrics of some kinds."""
    return [metric for metric in METRICS if isinstance(metric, kinds)]
