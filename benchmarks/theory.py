"""The paper's analysis of the divergences, checked by numbers: writes docs/theory.md and its figures.

Run ``python benchmarks/theory.py`` (about a minute on one core; needs matplotlib, of the extra "plots").

Four questions, for every divergence between Gaussians N(mean, sigma^2 I) at squared distance s: how large the gradient
is; how long the gradient flow on the prediction takes, by its formula and by simulation; whether all divergences are
one near s = 0; and how far the variational estimate is from the exact value, by the number of samples.
"""

from __future__ import annotations

import argparse
import math
import platform
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy.special import exp1, expi
from torch import Tensor

import fdu_kernels as fk
from fdu.versions import versions
from fdu_kernels.divergence import Divergence

matplotlib.use("svg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SHOWN = ("squared_hellinger", "jensen_shannon", "le_cam", "kl", "alpha:0.3", "mse", "pearson_chi2")
"""The divergences of the figures, from the most damping to the most amplifying."""
KINKED = ("total_variation", "hockey_stick")
DISTANCES = (0.01, 0.1, 1.0, 10.0, 60.0)
FLOW_FROM, FLOW_TO = 4.0, 0.04
"""The flow's first and last s: a tenth of the distance is left."""
FLOW_STEP = 1e-3
FLOW_SIZE = 64
"""Elements of the prediction that the simulation moves."""
ESTIMATED = ("kl", "jensen_shannon", "squared_hellinger", "le_cam")
ESTIMATE_AT = 1.0
DIMENSIONS = 16
SAMPLES = (256, 512, 1024, 2048, 4096, 8192)
TRIALS = 40


Estimates = dict[str, dict[int, dict[str, tuple[float, float]]]]
"""By divergence, number of samples and critic: mean and standard deviation over the trials."""


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
    flows = {name: flow(fk.get_divergence(name)) for name in fk.divergences() if name not in KINKED}
    draw_flows(figures / "flow.svg")
    estimates = {name: estimate(fk.get_divergence(name)) for name in ESTIMATED}
    draw_estimates(figures / "estimate.svg", estimates)
    page = PAGE.format(
        gradients=gradient_table(),
        order=gradient_order(),
        flows=flow_table(flows),
        flow_error=f"{max(abs(simulated / exact - 1) for exact, simulated in flows.values()):.1e}",
        flow_from=FLOW_FROM,
        flow_to=FLOW_TO,
        flow_size=FLOW_SIZE,
        flow_step=FLOW_STEP,
        local=local_table(),
        estimates=estimate_table(estimates),
        at=ESTIMATE_AT,
        dimensions=DIMENSIONS,
        trials=TRIALS,
        rates=rates(estimates),
        machine=f"{platform.machine()} CPU, one thread, float64",
        versions=", ".join(f"{name} {versions()[name]}" for name in ("python", "torch")),
    )
    (options.docs / "theory.md").write_text(page, encoding="utf-8")


# Gradient magnitude


def slope(divergence: Divergence, s: float | Tensor) -> Tensor:
    """h'(s)."""
    return divergence.profile_grad(torch.as_tensor(s))


def smooth() -> list[Divergence]:
    """Every divergence whose h'(0) is finite and not 0."""
    return [fk.get_divergence(name) for name in fk.divergences() if name not in KINKED]


def gradient_table() -> str:
    """h'(s) / h'(0) by divergence and distance."""
    rows = [
        [f"`{divergence}`", f"{divergence.slope_at_zero:.4g}"]
        + [f"{float(slope(divergence, s)) / divergence.slope_at_zero:.3g}" for s in DISTANCES]
        for divergence in smooth()
    ]
    rows.sort(key=lambda row: float(row[-1]))
    return table(["divergence", "h'(0)", *(f"s = {s:g}" for s in DISTANCES)], rows)


def gradient_order() -> str:
    """Whether H <= mse <= chi-square holds on a grid, raw and standardised."""
    s = torch.logspace(-6, math.log10(60), 4000)
    hellinger, mse, chi2 = (slope(fk.get_divergence(name), s) for name in ("squared_hellinger", "mse", "pearson_chi2"))
    raw = bool((hellinger <= mse).all() and (mse <= chi2).all())
    standardised = bool((8 * hellinger <= mse).all())
    if not (raw and standardised):
        return "It does **not** hold everywhere."
    return "It holds at all 4,000 distances tried between 1e-6 and 60, as it stands and after the division by h'(0)."


def draw_gradients(path: Path) -> None:
    """h'(s) / h'(0) against s."""
    s = torch.logspace(-2, math.log10(60), 300)
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for name in SHOWN:
        divergence = fk.get_divergence(name)
        axes.loglog(s, slope(divergence, s) / divergence.slope_at_zero, label=name)
    axes.set(xlabel="s", ylabel="h'(s) / h'(0)", ylim=(1e-4, 1e3))
    save(figure, axes, path)


# Gradient flow


def flow_time(divergence: Divergence, start: float, end: float) -> float:
    """Time for ds/dt = -4 s h'(s) from ``start`` to ``end``, in closed form where h is of the (c, k) family."""
    if divergence.exponential is not None:
        c, k = divergence.exponential
        if k == 0:
            return math.log(start / end) / (4 * c)
        if k > 0:
            return float(exp1(k * end) - exp1(k * start)) / (4 * c)
        return float(expi(-k * start) - expi(-k * end)) / (4 * c)
    # Gauss-Legendre over log s, where the integrand 1 / (4 h') is smooth.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    low, high = math.log(end), math.log(start)
    places = torch.as_tensor((high - low) / 2 * nodes + (high + low) / 2).exp()
    return float((torch.as_tensor(weights) / (4 * slope(divergence, places))).sum()) * (high - low) / 2


def flow(divergence: Divergence) -> tuple[float, float]:
    """The time from FLOW_FROM to FLOW_TO, standardised to h'(0) = 1: by the formula, and simulated."""
    exact = flow_time(divergence, FLOW_FROM, FLOW_TO) * divergence.slope_at_zero
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, FLOW_SIZE, generator=generator)
    away = torch.randn(1, FLOW_SIZE, generator=generator)
    pred = target + away / away.norm() * math.sqrt(FLOW_FROM)
    time, step, s = 0.0, FLOW_STEP, FLOW_FROM
    while s > FLOW_TO:
        # Heun's method on d pred / dt = -grad, with the very losses that train.
        first = gradient(pred, target, divergence)
        second = gradient(pred - step * first, target, divergence)
        pred = pred - step / 2 * (first + second)
        before, s = s, float((pred - target).square().sum())
        time += step
    # s falls like exp(-t) within a step: the part of the last one that was needed.
    return exact, time - step * math.log(FLOW_TO / s) / math.log(before / s)


def gradient(pred: Tensor, target: Tensor, divergence: Divergence) -> Tensor:
    """The gradient of the loss standardised to h'(0) = 1."""
    _, grad = fk.gaussian_divergence_value_and_grad(pred, target, divergence, distance="sum")
    return grad / divergence.slope_at_zero


def flow_table(flows: dict[str, tuple[float, float]]) -> str:
    """The times of all divergences, the fastest first."""
    rows = [
        [f"`{name}`", f"{exact:.4f}", f"{simulated:.4f}"]
        for name, (exact, simulated) in sorted(flows.items(), key=lambda item: item[1][0])
    ]
    return table(["divergence", "time, formula", "time, simulated"], rows)


def draw_flows(path: Path) -> None:
    """s against time."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    s = np.geomspace(FLOW_FROM, FLOW_TO, 100)
    for name in SHOWN:
        divergence = fk.get_divergence(name)
        times = [flow_time(divergence, FLOW_FROM, end) * divergence.slope_at_zero for end in s[1:]]
        axes.semilogy([0, *times], s, label=name)
    axes.set(xlabel="time, of losses with h'(0) = 1", ylabel="s")
    save(figure, axes, path)


# Near s = 0


def local_table() -> str:
    """h(s) / (f''(1) s / 2) as s falls."""
    distances = (1.0, 1e-1, 1e-2, 1e-4, 1e-6)
    rows = [[f"`{divergence}`", *(f"{ratio(divergence, s):.6f}" for s in distances)] for divergence in smooth()]
    return table(["divergence", *(f"s = {s:g}" for s in distances)], rows)


def ratio(divergence: Divergence, s: float) -> float:
    """h(s) / (f''(1) s / 2)."""
    # f''(1) from the generator itself, where there is one: not from the profile that is to be checked.
    if divergence.generator is None:
        curvature = 2 * divergence.slope_at_zero
    else:
        one = torch.ones((), requires_grad=True)
        (first,) = torch.autograd.grad(divergence.f(one), one, create_graph=True)
        curvature = float(torch.autograd.grad(first, one)[0])
    return float(divergence.profile(torch.tensor(s))) / (curvature * s / 2)


# The variational estimate


def estimate(divergence: Divergence) -> dict[int, dict[str, tuple[float, float]]]:
    """By number of samples: mean and standard deviation over trials of the bound, for two critics.

    "true" is the true density ratio; "fitted" the best critic of the right form, v = a x + b, for the samples it is
    judged on; "fresh" that critic on the distribution itself; "gain" by how much the fitted one exceeds the true one.
    """
    found = {}
    for samples in SAMPLES:
        trials: dict[str, list[float]] = {"true": [], "fitted": [], "fresh": []}
        for trial in range(TRIALS):
            generator = torch.Generator().manual_seed(1000 * trial + samples)
            p, q = draw(samples, generator)
            weights = true_critic()
            trials["true"].append(float(bound(weights, p, q, divergence)))
            fitted = fit(weights, p, q, divergence)
            trials["fitted"].append(float(bound(fitted, p, q, divergence)))
            fresh = torch.Generator().manual_seed(10**6 + trial)
            trials["fresh"].append(float(bound(fitted, *draw(20000, fresh), divergence)))
        # On the same samples, so that their chance does not count.
        trials["gain"] = [fitted - true for fitted, true in zip(trials["fitted"], trials["true"], strict=True)]
        found[samples] = {name: (float(np.mean(values)), float(np.std(values))) for name, values in trials.items()}
    return found


def draw(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples [n, D] of p = N(mean, I) and of q = N(0, I), at squared distance ESTIMATE_AT."""
    p, q = (torch.randn(samples, DIMENSIONS, generator=generator) for _ in range(2))
    p[:, 0] += math.sqrt(ESTIMATE_AT)
    return p, q


def true_critic() -> Tensor:
    """a and b of log p/q = a x + b, [D + 1]."""
    weights = torch.zeros(DIMENSIONS + 1)
    weights[0], weights[-1] = math.sqrt(ESTIMATE_AT), -ESTIMATE_AT / 2
    return weights


def bound(weights: Tensor, p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    """The variational bound with the critic v = a x + b, []."""
    ratios = [x @ weights[:-1] + weights[-1] for x in (p, q)]
    return fk.variational_divergence(*ratios, divergence, backend="torch")


def fit(weights: Tensor, p: Tensor, q: Tensor, divergence: Divergence) -> Tensor:
    """The critic that makes the bound on these samples largest, from the true one on."""
    weights = weights.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def minus() -> Tensor:
        optimizer.zero_grad()
        loss = -bound(weights, p, q, divergence)
        loss.backward()
        return loss

    optimizer.step(minus)
    return weights.detach()


def estimate_table(estimates: Estimates) -> str:
    """The estimates of every critic less the exact value, for some numbers of samples."""
    rows = []
    for name, by_samples in estimates.items():
        exact = float(fk.get_divergence(name).profile(torch.tensor(ESTIMATE_AT)))
        for samples in SAMPLES[::2]:
            judged = [by_samples[samples][critic] for critic in ("true", "fitted", "fresh")]
            cells = [f"{mean - exact:+.4f} ± {deviation:.4f}" for mean, deviation in judged]
            rows.append([f"`{name}`", f"{exact:.4f}", str(samples), *cells])
    return table(["divergence", "exact h", "samples", "true critic", "fitted critic", "fitted, fresh samples"], rows)


def rates(estimates: Estimates) -> str:
    """The power of the number of samples with which spread and bias fall, from the last four numbers."""
    lines = []
    for name, by_samples in estimates.items():
        last = SAMPLES[-4:]
        spread = power(last, [by_samples[samples]["true"][1] for samples in last])
        bias = power(last, [by_samples[samples]["gain"][0] for samples in last])
        lines.append([f"`{name}`", f"{spread:.2f}", f"{bias:.2f}"])
    return table(["divergence", "spread, true critic", "gain of the fitted critic"], lines)


def power(samples: tuple[int, ...], values: list[float]) -> float:
    """The slope of values against samples in logarithms."""
    return float(np.polyfit(np.log(samples), np.log(np.abs(values)), 1)[0])


def draw_estimates(path: Path, estimates: Estimates) -> None:
    """Gain and spread against the number of samples."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for name, by_samples in estimates.items():
        exact = float(fk.get_divergence(name).profile(torch.tensor(ESTIMATE_AT)))
        bias = [by_samples[samples]["gain"][0] / exact for samples in SAMPLES]
        (line,) = axes.loglog(SAMPLES, bias, marker="o", label=f"{name}: gain of the fitted critic")
        spread = [by_samples[samples]["true"][1] / exact for samples in SAMPLES]
        axes.loglog(SAMPLES, spread, linestyle=":", color=line.get_color(), label=f"{name}: spread, true critic")
    axes.set(xlabel="samples", ylabel="share of the exact value")
    save(figure, axes, path)


# The page


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def save(figure: Any, axes: Any, path: Path) -> None:
    """Write a figure; the same numbers give the same file."""
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.2)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


PAGE = """# The analysis of the paper, checked

Made by `python benchmarks/theory.py`. {machine}; {versions}.

Between Gaussians of one covariance a divergence is a function h of the squared distance s of their means
([design.md](design.md#fact-1-between-gaussians-every-f-divergence-is-a-function-h-of-s)). So what is said of a
divergence can be computed, also for those which the paper (Novello et al. 2026, arXiv 2509.21167) estimates with a
critic.

## How large the gradient is

The gradient of the loss in the prediction has the length 2 sqrt(s) h'(s) / sigma. The table shows h'(s)/h'(0): by how
much a sample at distance s is damped (below 1) or amplified, once all losses have one scale.

{gradients}

![h'(s)/h'(0) against s](theory/gradient.svg)

*Claim: the squared Hellinger's gradient is smaller than that of mse, and this smaller than that of chi-square.*
{order} At s = 0.01, where the reference implementation's settings (sigma = 1) leave s, the three differ by about one
percent: there the claim is true and without consequence.

## How fast the gradient flow converges

On the prediction itself, d pred/dt = -grad gives ds/dt = -4 s h'(s) (sigma = 1). For h = c expm1(k s)/k the time from
s0 to s is

    k = 0:  log(s0/s) / (4 c)        k > 0:  (E1(k s) - E1(k s0)) / (4 c)        k < 0:  (Ei(-k s0) - Ei(-k s)) / (4 c)

with the exponential integrals E1 and Ei, and else the integral of 1/(4 s h'(s)), which the table of h' gives. Here
from s = {flow_from} to s = {flow_to}, all losses with h'(0) = 1, against Heun's method (step {flow_step}) on
{flow_size} elements with the gradients of `gaussian_divergence_value_and_grad`; the largest relative difference is
{flow_error}.

{flows}

![s against time](theory/flow.svg)

An amplifying divergence is faster far away and the same near the end: near s = 0 all fall like exp(-4 t). Under Adam,
whose steps do not grow with the gradient, the order can turn around: what counts there is which samples of a batch
the step listens to ([erasure.md](erasure.md#what-sigma-decides)).

## Near s = 0 all divergences are one

h(s) / (f''(1) s / 2), with f''(1) from the generator by automatic differentiation:

{local}

Total variation and the hockey stick have a kink: h grows like sqrt(s) (or, for a hockey stick away from 1, faster
than any power falls), and no multiple of s stands for them.

## What a critic costs

The variational bound E_p[A(v)] - E_q[B(v)] on n samples each of two Gaussians in {dimensions} dimensions at s = {at},
minus the exact h, mean ± standard deviation over {trials} trials. "True critic": v = log p/q. "Fitted critic": the
best v = a x + b on the same samples, the right family with {dimensions} + 1 parameters. "Fresh": that critic on
20,000 new samples.

{estimates}

![Gain and spread against the number of samples](theory/estimate.svg)

The powers of n with which they fall (from the last four numbers of samples); the gain of the fitted critic over the
true one is taken on the same samples:

{rates}

A critic that knows the ratio is unbiased and has a spread of order n^-1/2. A fitted one is too high on the samples it
has seen, by an amount of order (number of its parameters)/n, and too low on others. The exact h has neither: for
Gaussians the game buys nothing that h does not give at once. What a network trained against a critic in the course of
an erasure does beyond this is measured on the embedded pipeline in [erasure.md](erasure.md)."""


if __name__ == "__main__":
    main()
