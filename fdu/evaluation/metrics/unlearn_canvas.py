"""The accuracies of UnlearnCanvas (Zhang et al. 2024, arXiv 2402.11846), each the better the higher."""

from __future__ import annotations

from fdu.evaluation.metrics.metric import ShareMetric

UA = ShareMetric(
    "unlearn_canvas.UA",
    "UA",
    "unlearning accuracy: images of the target in which the judge sees something else",
    "target_accuracy",
    complement=True,
)
IRA = ShareMetric(
    "unlearn_canvas.IRA",
    "IRA",
    "in-domain retain accuracy: images of its neighbours that show what was asked for",
    "retained_by_group.near",
)
CRA = ShareMetric(
    "unlearn_canvas.CRA",
    "CRA",
    "cross-domain retain accuracy: the same of classes of another kind",
    "cross_domain_accuracy",
)
