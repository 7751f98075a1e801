"""The paper's analysis of the divergences, checked by numbers; writes docs/theory.md and its figures.

    python experiments/theory.py        # about a minute on one core

Five questions about every divergence between Gaussians N(mean, sigma^2 I) at squared distance s. Does h follow from the
definition? How large is the gradient? How long does the gradient flow on the prediction take? Do all divergences
coincide near s = 0? How far is the variational estimate from the exact value, by the number of samples? Each question
ends in a claim and a verdict, which follows from the numbers.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import theory_critic as critic
import theory_gaussian as gaussian
import torch
from experiment import conditions, current, dated, fill, run

import fdu_kernels as fk
from fdu.comparison.page import COLOURS
from fdu.comparison.sweep import Job, Record
from fdu.report.charts import Chart, Scale, mark
from fdu.storage.output import write_text

SHOWN = ("squared_hellinger", "jensen_shannon", "le_cam", "alpha:0.3", "mse", "pearson_chi2")
"""The divergences of the figure."""


def jobs(cache: Path) -> list[Job]:
    """The slow computations: every flow and every estimate."""
    flow = [gaussian.FLOW_FROM, gaussian.FLOW_TO, gaussian.FLOW_STEP, gaussian.FLOW_SIZE]
    estimate = [critic.ESTIMATE_AT, critic.DIMENSIONS, critic.SAMPLES, critic.FRESH, critic.TRIALS]
    kinds = (("flow", flow, map(str, gaussian.smooth())), ("estimate", estimate, critic.ESTIMATED))
    return [
        dated(Job(f"{kind}/{name}", {kind: settings, "divergence": name}, functools.partial(compute, kind, name)))
        for kind, settings, names in kinds
        for name in names
    ]


def compute(kind: str, name: str) -> Record:
    """One flow or estimate, in float64."""
    torch.set_default_dtype(torch.float64)
    function = gaussian.flow if kind == "flow" else critic.estimate
    return {"figures": function(fk.get_divergence(name))}


def write_page(results: Path, docs: Path) -> None:
    """Write page and figures, once all computations have a record."""
    torch.set_default_dtype(torch.float64)
    every = jobs(Path())
    found = current(results, "theory", every)
    if len(found) < len(every):
        print("docs/theory.md is left as it is: it needs all records")
        return
    flows, estimates = (
        {name.removeprefix(kind): record["figures"] for name, record in found.items() if name.startswith(kind)}
        for kind in ("flow/", "estimate/")
    )
    write_text(docs / "theory" / "gradient.svg", gradient_chart())
    write_text(docs / "theory.md", page(flows, estimates, conditions(found[every[0].name])))


def gradient_chart() -> str:
    """h'(s)/h'(0) against s as SVG, from 1e-4 to 1e3."""
    chart = Chart(Scale(0.01, 60, [0.01, 0.1, 1, 10], log=True), Scale.powers([1e-4, 1e3]), "s", "h'(s)/h'(0)")
    s = torch.logspace(-2, math.log10(60), 60)
    legend = []
    for name, colour in zip(SHOWN, COLOURS, strict=False):
        slopes = gaussian.relative_slope(fk.get_divergence(name), s)
        points = [(x, y) for x, y in zip(s.tolist(), slopes.tolist(), strict=True) if 1e-4 < y < 1e3]
        chart.line(points, f'fill="none" stroke="{colour}" stroke-width="1.6"')
        legend.append((mark("circle", 0, 0, colour), name))
    chart.summary, chart.legend = "h'(s)/h'(0) against s, by divergence", legend
    return chart.svg(whole=True)


def page(flows: gaussian.Flows, estimates: critic.Estimates, made_on: dict[str, str]) -> str:
    """docs/theory.md."""
    return fill(
        "theory.md",
        **made_on,
        gaussian=gaussian,
        critic=critic,
        distances=gaussian.listed(gaussian.DISTANCES),
        definitions=gaussian.definition_table(),
        kl=gaussian.kl_claim(),
        alpha=gaussian.alpha_claim(),
        gradients=gaussian.gradient_table(),
        gradient=gaussian.gradient_claim(),
        flows=gaussian.flow_table(flows),
        flow=gaussian.flow_claim(flows),
        locals=gaussian.local_table(),
        kinks=gaussian.kinks(),
        local=gaussian.local_claim(),
        estimates=critic.estimate_table(estimates),
        rates=critic.rates(estimates),
        game=critic.game_claim(estimates),
        bias=critic.estimate_claim(estimates),
    )


if __name__ == "__main__":
    run(__doc__, "theory", jobs, write_page)
