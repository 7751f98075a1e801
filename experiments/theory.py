"""The paper's analysis of the divergences, checked by numbers: writes docs/theory.md and its figures.

Run ``python benchmarks/theory.py`` (about a minute on one core; needs matplotlib, of the extra "plots").

Five questions, for every divergence between Gaussians N(mean, sigma^2 I) at squared distance s: whether h is what the
definition says; how large the gradient is; how long the gradient flow on the prediction takes, by its formula and by
simulation; whether all divergences are one near s = 0; and how far the variational estimate is from the exact value,
by the number of samples. Each ends in a claim and a verdict, which follows from the numbers.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from theory_claim import claim_table, listed
from theory_critic import (
    DIMENSIONS,
    ESTIMATE_AT,
    ESTIMATED,
    FRESH,
    TRIALS,
    draw_estimates,
    estimate,
    estimate_claim,
    estimate_table,
    game_claim,
    rates,
)
from theory_gaussian import (
    DISTANCES,
    FLOW_FROM,
    FLOW_SIZE,
    FLOW_STEP,
    FLOW_TO,
    alpha_claim,
    definition_table,
    draw_flows,
    draw_gradients,
    flow,
    flow_claim,
    flow_table,
    gradient_claim,
    gradient_table,
    kinks,
    kl_claim,
    local_claim,
    local_table,
    smooth,
)

import fdu_kernels as fk
from fdu.storage.output import write_text
from fdu.storage.versions import versions

HERE = Path(__file__).parent


def main() -> None:
    """Compute everything, draw the figures, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="where theory.md and theory/ go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    figures = options.docs / "theory"
    figures.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "fdu", "axes.spines.top": False, "axes.spines.right": False})

    draw_gradients(figures / "gradient.svg")
    flows = {str(divergence): flow(divergence) for divergence in smooth()}
    draw_flows(figures / "flow.svg")
    estimates = {name: estimate(fk.get_divergence(name)) for name in ESTIMATED}
    draw_estimates(figures / "estimate.svg", estimates)
    claims = {
        "kl_claim": kl_claim(),
        "alpha_claim": alpha_claim(),
        "gradient_claim": gradient_claim(),
        "flow_claim": flow_claim(flows),
        "local_claim": local_claim(),
        "game_claim": game_claim(estimates),
        "estimate_claim": estimate_claim(estimates),
    }
    page = PAGE.format(
        claims=claim_table(list(claims.values())),
        **{name: claim.text() for name, claim in claims.items()},
        definitions=definition_table(),
        distances=listed(DISTANCES),
        gradients=gradient_table(),
        flows=flow_table(flows),
        flow_from=FLOW_FROM,
        flow_to=FLOW_TO,
        flow_size=FLOW_SIZE,
        flow_step=FLOW_STEP,
        local=local_table(),
        kinks=kinks(),
        estimates=estimate_table(estimates),
        at=ESTIMATE_AT,
        dimensions=DIMENSIONS,
        trials=TRIALS,
        fresh=FRESH,
        rates=rates(estimates),
        machine=f"{platform.machine()} CPU, one thread, float64",
        versions=", ".join(f"{name} {versions()[name]}" for name in ("python", "torch")),
    )
    write_text(options.docs / "theory.md", page)


PAGE = """# The analysis of the paper, checked

Made by `python benchmarks/theory.py`, verdicts included. {machine}; {versions}.

Between Gaussians of one covariance a divergence is a function h of the squared distance s of their means
([design.md](design.md#fact-1-between-gaussians-every-f-divergence-is-a-function-h-of-s)). So what is said of a
divergence can be computed, also for those which the paper (Novello et al. 2026, arXiv 2509.21167) estimates with a
critic. "Our addition" is what this project says and the paper, as far as we know, does not.

{claims}

## Closed forms

h(s) = E_q[f(p/q)] by quadrature from the generator f alone, against h of the package, at s = {distances}.
`mse` has no generator: it is h(s) = s.

{definitions}

{kl_claim}

{alpha_claim}

## How large the gradient is

The gradient of the loss in the prediction has the length 2 sqrt(s) h'(s) / sigma. The table shows h'(s)/h'(0): by how
much a sample at distance s is damped (below 1) or amplified, once all losses have one scale. Where a kink makes h'(0)
infinite or 0, it shows h'(s)/h'(1).

{gradients}

![h'(s)/h'(0) against s](theory/gradient.svg)

{gradient_claim}

## How fast the gradient flow converges

On the prediction itself, d pred/dt = -grad gives ds/dt = -4 s h'(s) (sigma = 1). For h = c expm1(k s)/k the time from
s0 to s is

    k = 0:  log(s0/s) / (4 c)        k > 0:  (E1(k s) - E1(k s0)) / (4 c)        k < 0:  (Ei(-k s0) - Ei(-k s)) / (4 c)

with the exponential integrals E1 and Ei, and else the integral of 1/(4 s h'(s)), which the table of h' gives. Here
from s = {flow_from} to s = {flow_to}, all losses with h'(0) = 1, against Heun's method (step {flow_step}) on
{flow_size} elements with the gradients of `gaussian_divergence_value_and_grad`:

{flows}

![s against time](theory/flow.svg)

{flow_claim}

Under Adam, whose steps do not grow with the gradient, what counts is which samples of a batch the step listens to:
[erasure.md](erasure.md#what-sigma-decides).

## Near s = 0 all divergences are one

h(s) / (f''(1) s / 2), with f''(1) from the generator by automatic differentiation. `mse`, which has none, is left out:
by its own slope its ratio would be 1 whatever it is.

{local}

{local_claim}

Total variation and the hockey stick have a kink, and no multiple of s stands for them. The powers of s with which
their h falls instead:

{kinks}

## What a critic costs

The variational bound E_p[A(v)] - E_q[B(v)] on n samples each of two Gaussians in {dimensions} dimensions at s = {at},
minus the exact h, mean ± standard deviation over {trials} trials. "True critic": v = log p/q. "Fitted critic": the
best v = a x + b on the same samples, the right family with {dimensions} + 1 parameters. "Fresh": that critic on
{fresh:,} new samples.

{estimates}

![Gain and spread against the number of samples](theory/estimate.svg)

The powers of n with which they fall (from the last four numbers of samples), and the constants before them at the
largest n, with what asymptotic theory makes of them in brackets (`expected` in the script). "Gain": how much the fitted
critic exceeds the true one on its own samples; "loss": how much it falls short of it on the same fresh samples.

{rates}

{estimate_claim}

{game_claim}
"""


if __name__ == "__main__":
    main()
