"""Divergences between Gaussians: closed forms, gradients, the gradient flow, and what all are near s = 0."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from experiment import Claim
from scipy.integrate import quad
from scipy.special import exp1, expi
from torch import Tensor

import fdu_kernels as fk
from fdu.comparison.page import markdown
from fdu_kernels.divergence import Divergence
from fdu_kernels.scalar import derivative

SHOWN = ("squared_hellinger", "jensen_shannon", "le_cam", "kl", "alpha:0.3", "mse", "pearson_chi2")
"""The divergences of the figures, from the most damping to the most amplifying."""
KINKED = ("total_variation", "hockey_stick")
DISTANCES = (0.01, 0.1, 1.0, 10.0, 60.0)
EXACT = 1e-12
"""What counts as rounding, relative."""
ALPHAS = (-1.0, 0.3, 0.5, 1.5, 2.0)
LOCAL = (1.0, 1e-1, 1e-2, 1e-4, 1e-6)
"""The distances of the table near s = 0."""
FLOW_FROM, FLOW_TO, FLOW_ON = 4.0, 0.04, 0.004
"""The flow's first and last s, where a tenth of the distance is left; and where a last stretch after it ends."""
FLOW_STEP = 1e-3
FLOW_SIZE = 64
"""Elements of the prediction that the simulation moves."""
Flows = dict[str, tuple[float, float]]
"""By divergence: the time by the formula, and as simulated."""


# Closed forms


def smooth() -> list[Divergence]:
    """Every divergence whose h'(0) is finite and not 0."""
    return [fk.get_divergence(name) for name in fk.divergences() if name not in KINKED]


def generated() -> list[Divergence]:
    """The smooth divergences that have a generator: all but mse."""
    return [divergence for divergence in smooth() if divergence.generator is not None]


def value(divergence: Divergence, s: float) -> float:
    """h(s), as the package has it."""
    return float(divergence.profile(torch.tensor(s)))


def by_definition(divergence: Divergence, s: float) -> float:
    """E_q[f(p/q)] by quadrature, from the generator alone: log p/q = sqrt(s) z - s/2 with z ~ N(0, 1) under q."""
    # The trapezoidal rule: its error falls exponentially for what is smooth and vanishes at both ends.
    z = torch.linspace(-40, 40, 40_001)
    values = divergence.f(torch.exp(math.sqrt(s) * z - s / 2)) * torch.exp(-z.square() / 2)
    return float(torch.trapezoid(values, z)) / math.sqrt(2 * math.pi)


def definition_error(divergence: Divergence) -> float:
    """The largest relative difference of h from the definition over DISTANCES."""
    return max(abs(value(divergence, s) / by_definition(divergence, s) - 1) for s in DISTANCES)


def definition_table() -> str:
    """h(1) by the definition, and whether the package has the definition's value everywhere."""
    rows = []
    for divergence in generated():
        form = "a table" if divergence.exponential is None else "c = {:g}, k = {:g}".format(*divergence.exponential)
        agrees = "yes" if definition_error(divergence) < EXACT else f"**to {definition_error(divergence):.0e}**"
        rows.append([f"`{divergence}`", form, f"{by_definition(divergence, 1.0):.6f}", agrees])
    return markdown(["divergence", "h in the package", "h(1) by the definition", f"agree to {EXACT:g}"], rows)


def kl_claim() -> Claim:
    """Whether the definition makes kl a multiple of s."""
    factors = {"kl": 0.5, "reverse_kl": 0.5, "jeffreys": 1.0}
    linear = [
        name
        for name, factor in factors.items()
        if all(abs(by_definition(fk.get_divergence(name), s) / (factor * s) - 1) < EXACT for s in DISTANCES)
    ]
    others = [f"`{name}`" for name in linear if name != "kl"]
    return Claim(
        "MSE is the KL case",
        "Closed forms",
        "the paper",
        "unlearning with MSE is the KL case of the framework.",
        ("confirmed" if "kl" in linear else "refuted") + (", but not of the KL alone" if others else ""),
        f"The definition gives a multiple of s, to a relative {EXACT:g} at s = {listed(DISTANCES)}, for "
        + (", ".join(f"`{name}` ({factors[name]:g} s)" for name in linear) or "none of those tried")
        + (
            f". MSE is {' and '.join(others)} as well, up to that factor, and cannot tell them apart."
            if others
            else "."
        ),
    )


def alpha_claim() -> Claim:
    """Whether alpha-divergences have the closed form, and the paper's losses its gradients."""
    wrong = [alpha for alpha in ALPHAS if not definition_error(fk.get_divergence("alpha", alpha=alpha)) < EXACT]
    s = torch.tensor(DISTANCES)
    losses = {"squared_hellinger": torch.exp(-s / 8) / 8, "pearson_chi2": torch.exp(s)}
    ours = [
        name
        for name, grad in losses.items()
        if bool(((slope(fk.get_divergence(name), s) / grad - 1).abs() < EXACT).all())
    ]
    return Claim(
        "Alpha-divergences have closed forms",
        "Closed forms",
        "the paper",
        "a family of alpha-divergences has closed forms between Gaussians, as cheap as MSE.",
        f"refuted for alpha = {listed(wrong)}" if wrong else "confirmed",
        f"c expm1(k s)/k with c = 1/2, k = alpha (alpha - 1)/2 is the definition's value to a relative {EXACT:g} for "
        f"alpha = {listed([alpha for alpha in ALPHAS if alpha not in wrong])}, and costs one exponential a sample (not "
        "an element) more than MSE. The paper's losses -exp(-s/8) and exp(s) have the gradients of "
        + (" and ".join(f"`{name}`" for name in ours) or "none of ours")
        + ", in this order; what they leave out is a constant.",
    )


# Gradient magnitude


def slope(divergence: Divergence, s: float | Tensor) -> Tensor:
    """h'(s)."""
    return divergence.profile_grad(torch.as_tensor(s))


def relative_slope(divergence: Divergence, s: float | Tensor) -> Tensor:
    """h'(s)/h'(0), or h'(s)/h'(1) where h'(0) is infinite or 0: as the training layer scales it."""
    kinked = divergence.name in KINKED
    return slope(divergence, s) / (slope(divergence, 1.0) if kinked else divergence.slope_at_zero)


def gradient_table() -> str:
    """The relative slope by divergence and distance; all divergences."""
    rows = [
        [f"`{divergence}`", f"{divergence.slope_at_zero:.4g}"]
        + [f"{float(relative_slope(divergence, s)):.3g}" for s in DISTANCES]
        for divergence in map(fk.get_divergence, fk.divergences())
    ]
    rows.sort(key=lambda row: float(row[-1]))
    return markdown(["divergence", "h'(0)", *(f"s = {s:g}" for s in DISTANCES)], rows)


def gradient_claim(names: tuple[str, str, str] = ("squared_hellinger", "mse", "pearson_chi2")) -> Claim:
    """Whether the gradients of three divergences are in this order on a grid, raw and standardised."""
    s = torch.logspace(-6, math.log10(60), 4000)
    low, middle, high = (fk.get_divergence(name) for name in names)
    holds = {
        words: bool((size(low, s) < size(middle, s)).all() and (size(middle, s) < size(high, s)).all())
        for words, size in (("as they are", slope), ("after the division by h'(0)", relative_slope))
    }
    at = {s: [float(relative_slope(one, s) / relative_slope(middle, s)) for one in (low, high)] for s in (0.01, 10)}
    near = max(abs(ratio - 1) for ratio in at[0.01])
    raw = float(slope(low, 1e-6) / slope(middle, 1e-6))
    order = " < ".join(f"`{name}`" for name in names)
    return Claim(
        "Hellinger's gradient is smaller than MSE's, chi-square's larger",
        "How large the gradient is",
        "the paper",
        "the divergence decides how large the gradient is. For its losses -exp(-s/8), s and exp(s) this means that "
        "Hellinger's is the smallest and chi-square's the largest.",
        ("confirmed" if all(holds.values()) else "refuted")
        + (", but without weight at small s" if near < 0.02 else ""),
        f"h' is in the order {order} at all {len(s):,} distances tried from 1e-6 to 60: "
        + "; ".join(f"{words}, {'yes' if held else 'no'}" for words, held in holds.items())
        + f". At s = 10 the first and the last, standardised, are {at[10][0]:.3g} and {at[10][1]:.3g} times the middle "
        f"one; at s = 0.01 they differ from it by at most {near:.1%}. There their order comes from a constant, "
        f"h' of the first being {raw:.4g} times that of the middle one at s = 1e-6, which a learning rate takes up and "
        "Adam removes. The reference implementation's sigma = 1 leaves s small: "
        "[erasure.md](erasure.md#what-sigma-decides).",
    )


def draw_gradients(path: Path) -> None:
    """h'(s) / h'(0) against s."""
    s = torch.logspace(-2, math.log10(60), 300)
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for name in SHOWN:
        divergence = fk.get_divergence(name)
        axes.loglog(s, relative_slope(divergence, s), label=name)
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


def flow_table(flows: Flows) -> str:
    """The times of all divergences, the fastest first."""
    rows = [
        [f"`{name}`", f"{exact:.4f}", f"{simulated:.4f}"]
        for name, (exact, simulated) in sorted(flows.items(), key=lambda item: item[1][0])
    ]
    return markdown(["divergence", "time, formula", "time, simulated"], rows)


def flow_claim(flows: Flows) -> Claim:
    """Whether the simulation takes the formula's time, and divergences differ in it far away and near the end."""
    error = max(abs(simulated / exact - 1) for exact, simulated in flows.values())
    ranked = sorted(flows, key=lambda name: flows[name][1])
    far = flows[ranked[-1]][1] / flows[ranked[0]][1]
    shown = [fk.get_divergence(name) for name in flows]
    last = [flow_time(divergence, FLOW_TO, FLOW_ON) * divergence.slope_at_zero for divergence in shown]
    near = max(last) / min(last)
    holds = error < 1e-3 and far > 1.1
    alike = near - 1 < (far - 1) / 10
    hellinger, mse, chi2 = (flows[name][1] for name in ("squared_hellinger", "mse", "pearson_chi2"))
    return Claim(
        "The divergence decides convergence",
        "How fast the gradient flow converges",
        "the paper",
        "the divergence decides how fast unlearning converges.",
        ("confirmed" if holds else "refuted") + (" for the flow far from its end, not near it" if alike else ""),
        f"Formula and simulation differ by at most {error:.1e}. From s = {FLOW_FROM:g} to {FLOW_TO:g}, all losses with "
        f"h'(0) = 1, `{ranked[-1]}` takes {far:.2f} times as long as `{ranked[0]}`; `pearson_chi2` takes "
        f"{chi2 / mse:.2f} and `squared_hellinger` {hellinger / mse:.2f} times the time of `mse` (without that scale "
        f"{hellinger / mse / fk.get_divergence('squared_hellinger').slope_at_zero:.1f} times). From {FLOW_TO:g} to "
        f"{FLOW_ON:g} the slowest takes {near:.3f} times as long as the fastest. That is the flow; whether an erasure "
        "under Adam is faster, [results.md](results.md) measures.",
    )


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
    rows = [[f"`{divergence}`", *(f"{ratio(divergence, s):.6f}" for s in LOCAL)] for divergence in generated()]
    return markdown(["divergence", *(f"s = {s:g}" for s in LOCAL)], rows)


def ratio(divergence: Divergence, s: float) -> float:
    """h(s) / (f''(1) s / 2), with f''(1) from the generator: not from the profile that is to be checked."""
    return value(divergence, s) / (float(derivative(derivative(divergence.f))(torch.ones(()))) * s / 2)


def local_claim() -> Claim:
    """Whether the ratio tends to 1, and how fast."""
    last = max(abs(ratio(divergence, LOCAL[-1]) - 1) for divergence in generated())
    bent = [divergence for divergence in generated() if abs(ratio(divergence, 0.01) - 1) > EXACT]
    powers = [power((1e-2, 1e-4), [ratio(divergence, s) - 1 for s in (1e-2, 1e-4)]) for divergence in bent]
    rates = [4 * float(relative_slope(divergence, LOCAL[-1])) for divergence in smooth()]
    return Claim(
        "All smooth divergences are one near s = 0, up to f''(1)",
        "Near s = 0 all divergences are one",
        "our addition",
        "h(s) tends to f''(1) s / 2, so that for small s the divergences differ by a factor only.",
        "confirmed" if last < 10 * LOCAL[-1] and max(abs(one - 1) for one in powers) < 0.05 else "refuted",
        f"At s = {LOCAL[-1]:g} all ratios are within {last:.1e} of 1; what is missing from 1 falls like s to the power "
        f"{min(powers):.3f} to {max(powers):.3f} from s = 0.01 to 0.0001 ({len(generated()) - len(bent)} of "
        f"{len(generated())} have nothing missing). So the flow with h'(0) = 1 ends like exp(-r t), with r = "
        f"{min(rates):.6f} to {max(rates):.6f} at s = {LOCAL[-1]:g}.",
    )


def kinks() -> str:
    """The powers of s with which the divergences with a kink fall."""
    spans = ((1.0, 0.1), (0.1, 0.01))
    rows = []
    for divergence in map(fk.get_divergence, KINKED):
        found = [power(span, [value(divergence, s) for s in span]) for span in spans]
        rows.append([f"`{divergence}`", *(f"{one:.2f}" for one in found)])
    return markdown(["divergence", *(f"s = {start:g} to {end:g}" for start, end in spans)], rows)
