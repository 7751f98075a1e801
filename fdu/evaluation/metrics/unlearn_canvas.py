"""The accuracies of UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846), higher is better."""

from __future__ import annotations

from fdu.evaluation.metrics.metric import ShareMetric

UA = ShareMetric(
    "unlearn_canvas.UA",
    "UA",
    "unlearning accuracy: share of the target's images in which the judge sees another class",
    "target_accuracy",
    complement=True,
)
IRA = ShareMetric(
    "unlearn_canvas.IRA",
    "IRA",
    "in-domain retain accuracy: share of its neighbours' images that show the requested class",
    "retained_by_group.near",
)
CRA = ShareMetric(
    "unlearn_canvas.CRA",
    "CRA",
    "cross-domain retain accuracy: the same for classes of another kind",
    "cross_domain_accuracy",
)
