"""The line charts of a report. The page's style sheet gives their lines a look by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdu.report.svg import Captioned, Chart, Frame, Scale

SMALL = Frame(width=360, height=204, left=46, top=10, right=10, bottom=44)
LOG_SPREAD = 1000
"""A curve whose largest value exceeds its median this many times has a logarithmic axis: pearson_chi2 can start at
1e17."""
CURVES = {
    "divergence": ("Divergence", "from the frozen model's output for the anchor; scaled so that h'(0) = 1"),
    "distance": ("Distance", "median squared distance from that output, in squared units of the denoiser's output"),
    "preservation": ("Preservation", "squared error on the preserved prompts, on the same scale as the divergence"),
    "critic": ("Critic", "its lower bound on the divergence"),
}
"""The training curves: title and explanation."""


def training_charts(history: Mapping[str, Sequence[float | None]]) -> list[Captioned]:
    """The training curves, one chart per column: each step faint, the running mean solid."""
    # None is NaN, which JSON lacks.
    courses = {name: np.array(history.get(name, ()), dtype=float) for name in CURVES}
    return [
        _training_chart(*CURVES[name], course)
        for name, course in courses.items()
        if (course[np.isfinite(course)] > 0).any()
    ]


def _training_chart(title: str, explanation: str, course: np.ndarray) -> Captioned:
    """A curve over the steps, where it is finite; its mean is over a window of a twentieth of the curve."""
    finite, reach = np.isfinite(course), max(len(course) // 40, 1)
    sums, counts = (
        np.convolve(one, np.ones(2 * reach + 1))[reach:-reach] for one in (np.where(finite, course, 0), finite)
    )
    mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)
    wide = course[finite].max() > LOG_SPREAD * np.median(course[finite])
    y = Scale.powers(course[finite & (course > 0)]) if wide else Scale.to(course[finite].max())
    chart = Chart(Scale.to(len(course)), y, "steps", frame=SMALL)
    for values, look in ((course, "raw"), (mean, "smooth")):
        points = [(step, max(value, y.low)) for step, value in enumerate(values, 1) if np.isfinite(value)]
        chart.line(points, f'class="{look}"')
    known = mean[np.isfinite(mean)]
    lost = "" if finite.all() else f"; {len(course) - finite.sum()} were not finite"
    told = f"smoothed: {known[0]:.3g} at the start, {known[-1]:.3g} at the end{lost}"
    return Captioned(title, explanation, chart.svg(f"{title} over {len(course)} steps, {told}"))


def share_chart(
    title: str, explanation: str, courses: Sequence[tuple[str, str, Sequence[tuple[int, Mapping[str, Any]]]]]
) -> Captioned:
    """Shares in [0, 1] against steps.

    Args:
        title, explanation: the caption.
        courses: for each line its name, its class in the style sheet, and (step, share) pairs, each share with the keys
            of a :class:`fdu.evaluation.intervals.Share`. Lines of the class "smooth" get a band for their
            intervals.
    """
    most = max((step for _, _, course in courses for step, _ in course), default=1) or 1
    percents = Scale(0, 100, range(0, 101, 25))
    chart = Chart(Scale.to(most, beyond=False), percents, "steps", unit=" %", frame=SMALL)
    for _, look, course in courses:
        if look == "smooth":
            chart.band([(step, *(100 * end for end in share["interval"])) for step, share in course], 'class="band"')
    for _, look, course in courses:
        chart.line([(step, 100 * share["value"]) for step, share in course], f'class="{look}"')
    told = [
        f"{name}: " + ", ".join(f"{100 * share['value']:.0f} % after {step}" for step, share in course)
        for name, _, course in courses
    ]
    return Captioned(title, explanation, chart.svg(f"{title}. {' steps; '.join(told)} steps"))
