"""The paper's analysis of the divergences, checked by numbers; writes docs/theory.md and its figures.

    python experiments/theory.py        # about a minute on one core

Five questions, for every divergence between Gaussians N(mean, sigma^2 I) at squared distance s: whether h is what the
definition says; how large the gradient is; how long the gradient flow on the prediction takes, by its formula and by
simulation; whether all divergences coincide near s = 0; and how far the variational estimate is from the exact value,
by the number of samples. Each ends in a claim and a verdict, which follows from the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import theory_critic as critic
import theory_gaussian as gaussian
import torch
from experiment import conditions, fill, run

import fdu_kernels as fk
from fdu.comparison.sweep import Job, Record, Records
from fdu.storage.output import write_text

STYLE = {"font.size": 9, "svg.hashsalt": "fdu", "axes.spines.top": False, "axes.spines.right": False}


def jobs(cache: Path) -> list[Job]:
    """The slow computations: every flow and every estimate."""
    identity = {
        "flow": [gaussian.FLOW_FROM, gaussian.FLOW_TO, gaussian.FLOW_STEP, gaussian.FLOW_SIZE],
        "estimate": [critic.ESTIMATE_AT, critic.DIMENSIONS, critic.SAMPLES, critic.FRESH, critic.TRIALS],
    }
    names = {"flow": map(str, gaussian.smooth()), "estimate": critic.ESTIMATED}
    return [
        Job(f"{kind}/{name}", {**identity, "divergence": name}, functools.partial(compute, kind, name))
        for kind in names
        for name in names[kind]
    ]


def compute(kind: str, name: str) -> Record:
    """One flow or estimate, in float64."""
    torch.set_default_dtype(torch.float64)
    function: Callable[..., Any] = {"flow": gaussian.flow, "estimate": critic.estimate}[kind]
    return {"figures": function(fk.get_divergence(name))}


def write_page(results: Path, docs: Path) -> None:
    """Write page and figures, once all computations have a record."""
    torch.set_default_dtype(torch.float64)
    found = Records(results / "theory.jsonl")
    records = {job.name: found.of(job.name, job.identity) for job in jobs(Path())}
    missing = [name for name, record in records.items() if record is None]
    if missing:
        print(f"docs/theory.md is left as it is: {missing[0]} and {len(missing) - 1} others have no record yet")
        return
    figures: dict[str, dict[str, Any]] = {"flow": {}, "estimate": {}}
    for name, record in records.items():
        kind, _, divergence = name.partition("/")
        figures[kind][divergence] = record["figures"]
    flows, estimates = figures["flow"], figures["estimate"]
    folder = docs / "theory"
    save(gaussian.draw_gradients, folder / "gradient.svg")
    save(gaussian.draw_flows, folder / "flow.svg")
    save(functools.partial(critic.draw_estimates, estimates=estimates), folder / "estimate.svg")
    write_text(docs / "theory.md", page(flows, estimates, conditions(records[next(iter(records))])))


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


def save(draw: Callable[[Any], None], path: Path) -> None:
    """Write a figure; the same numbers give the same file."""
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 3.4))
        draw(axes)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.grid(alpha=0.2)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    run(__doc__, lambda cache: {"theory": jobs(cache)}, write_page)
