"""Divergences between Gaussians: closed forms, gradients, the gradient flow, and their common limit near s = 0."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from experiment import finding
from scipy.integrate import simpson
from torch import Tensor

import fdu_kernels as fk
from fdu.comparison.page import markdown
from fdu_kernels.divergence import Divergence
from fdu_kernels.scalar import derivative

KINKED = ("total_variation", "hockey_stick")
DISTANCES = (0.01, 0.1, 1.0, 10.0, 60.0)
EXACT = 1e-12
"""Relative differences below this are rounding."""
ALPHAS = (-1.0, 0.3, 0.5, 1.5, 2.0)
LOCAL = (1.0, 1e-1, 1e-2, 1e-4, 1e-6)
"""The distances of the table near s = 0."""
FLOW_FROM, FLOW_TO, FLOW_ON = 4.0, 0.04, 0.004
"""The flow's first s; its last s, where a tenth of the distance is left; and the end of a further stretch."""
FLOW_STEP = 1e-3
FLOW_SIZE = 64
"""Elements of the prediction that the simulation moves."""
Finding = dict[str, Any]
Flows = dict[str, dict[str, float]]
"""By divergence: the time by the integral ("exact"), and as simulated."""


def listed(values: tuple[float, ...] | list[float]) -> str:
    """As "1, 2, 3"."""
    return ", ".join(f"{value:g}" for value in values)


def power(places: tuple[float, ...], values: list[float]) -> float:
    """The slope of values against places in logarithms."""
    return float(np.polyfit(np.log(places), np.log(np.abs(values)), 1)[0])


def span(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest of them."""
    ordered = sorted(values)
    return ordered[0], ordered[-1]


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
        error = definition_error(divergence)
        agrees = "yes" if error < EXACT else f"**to {error:.0e}**"
        rows.append([f"`{divergence}`", form, f"{by_definition(divergence, 1.0):.6f}", agrees])
    return markdown(["divergence", "h in the package", "h(1) by the definition", f"agree to {EXACT:g}"], rows)


def kl_claim() -> Finding:
    """Whether the definition makes kl a multiple of s."""
    factors = {"kl": 0.5, "reverse_kl": 0.5, "jeffreys": 1.0}
    linear = [
        name
        for name, factor in factors.items()
        if all(abs(by_definition(fk.get_divergence(name), s) / (factor * s) - 1) < EXACT for s in DISTANCES)
    ]
    return finding(
        ("confirmed" if "kl" in linear else "refuted") + (", but not of the KL alone" if len(linear) > 1 else ""),
        linear=", ".join(f"`{name}` ({factors[name]:g} s)" for name in linear) or "none of those tried",
    )


def alpha_claim() -> Finding:
    """Whether alpha-divergences have the closed form, and the paper's losses its gradients."""
    wrong = [alpha for alpha in ALPHAS if not definition_error(fk.get_divergence("alpha", alpha=alpha)) < EXACT]
    s = torch.tensor(DISTANCES)
    losses = {"squared_hellinger": torch.exp(-s / 8) / 8, "pearson_chi2": torch.exp(s)}
    ours = [
        f"`{name}`"
        for name, grad in losses.items()
        if bool(((slope(fk.get_divergence(name), s) / grad - 1).abs() < EXACT).all())
    ]
    return finding(
        f"refuted for alpha = {listed(wrong)}" if wrong else "confirmed",
        right=listed([alpha for alpha in ALPHAS if alpha not in wrong]),
        losses=" and ".join(ours) or "none of ours",
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


def gradient_claim(names: tuple[str, str, str] = ("squared_hellinger", "mse", "pearson_chi2")) -> Finding:
    """Whether the gradients of three divergences are in this order on a grid, raw and standardised."""
    s = torch.logspace(-6, math.log10(60), 4000)
    low, middle, high = (fk.get_divergence(name) for name in names)
    raw, relative = (
        bool((size(low, s) < size(middle, s)).all() and (size(middle, s) < size(high, s)).all())
        for size in (slope, relative_slope)
    )
    at = {s: [float(relative_slope(one, s) / relative_slope(middle, s)) for one in (low, high)] for s in (0.01, 10)}
    near = max(abs(ratio - 1) for ratio in at[0.01])
    return finding(
        ("confirmed" if raw and relative else "refuted")
        + (", but the difference is negligible at small s" if near < 0.02 else ""),
        names=names,
        order=" < ".join(f"`{name}`" for name in names),
        tried=len(s),
        raw_order="yes" if raw else "no",
        relative_order="yes" if relative else "no",
        low=at[10][0],
        high=at[10][1],
        near=f"{100 * near:.1f} %",
    )


# Gradient flow


def flow_time(divergence: Divergence, start: float, end: float) -> float:
    """Time for ds/dt = -4 s h'(s) from ``start`` to ``end``: the integral of 1 / (4 h'(s)) over log s."""
    log_s = torch.linspace(math.log(end), math.log(start), 2001)
    return float(simpson((1 / (4 * slope(divergence, log_s.exp()))).numpy(), x=log_s.numpy()))


def flow(divergence: Divergence) -> dict[str, float]:
    """The time from FLOW_FROM to FLOW_TO with h'(0) = 1: by the integral, and simulated."""
    exact = flow_time(divergence, FLOW_FROM, FLOW_TO) * divergence.slope_at_zero
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(1, FLOW_SIZE, generator=generator)
    away = torch.randn(1, FLOW_SIZE, generator=generator)
    pred = target + away / away.norm() * math.sqrt(FLOW_FROM)
    time, step, s = 0.0, FLOW_STEP, FLOW_FROM
    while s > FLOW_TO:
        # Heun's method on d pred / dt = -grad, with the losses that train.
        first = gradient(pred, target, divergence)
        second = gradient(pred - step * first, target, divergence)
        pred = pred - step / 2 * (first + second)
        before, s = s, float((pred - target).square().sum())
        time += step
    # Within a step s falls like exp(-t), which tells what part of the last step was needed.
    return {"exact": exact, "simulated": time - step * math.log(FLOW_TO / s) / math.log(before / s)}


def gradient(pred: Tensor, target: Tensor, divergence: Divergence) -> Tensor:
    """The gradient of the loss standardised to h'(0) = 1."""
    _, grad = fk.gaussian_divergence_value_and_grad(pred, target, divergence, distance="sum")
    return grad / divergence.slope_at_zero


def flow_table(flows: Flows) -> str:
    """The times of all divergences, the fastest first."""
    rows = [
        [f"`{name}`", f"{time['exact']:.4f}", f"{time['simulated']:.4f}"]
        for name, time in sorted(flows.items(), key=lambda item: item[1]["exact"])
    ]
    return markdown(["divergence", "time, integral", "time, simulated"], rows)


def flow_claim(flows: Flows) -> Finding:
    """Whether the simulation takes the integral's time, and whether divergences differ in it."""
    error = max(abs(time["simulated"] / time["exact"] - 1) for time in flows.values())
    times = {name: time["simulated"] for name, time in flows.items()}
    ranked = sorted(times, key=times.__getitem__)
    far = times[ranked[-1]] / times[ranked[0]]
    last = [flow_time(one, FLOW_TO, FLOW_ON) * one.slope_at_zero for one in map(fk.get_divergence, flows)]
    near = max(last) / min(last)
    return finding(
        ("confirmed" if error < 1e-3 and far > 1.1 else "refuted")
        + (" for the flow far from its end, but not near it" if near - 1 < (far - 1) / 10 else ""),
        error=error,
        slowest=ranked[-1],
        fastest=ranked[0],
        far=far,
        near=near,
        chi2=times["pearson_chi2"] / times["mse"],
        hellinger=times["squared_hellinger"] / times["mse"],
    )


# Near s = 0


def local_table() -> str:
    """h(s) / (f''(1) s / 2) as s falls."""
    rows = [[f"`{divergence}`", *(f"{ratio(divergence, s):.6f}" for s in LOCAL)] for divergence in generated()]
    return markdown(["divergence", *(f"s = {s:g}" for s in LOCAL)], rows)


def ratio(divergence: Divergence, s: float) -> float:
    """h(s) / (f''(1) s / 2), with f''(1) from the generator, since this checks the profile."""
    return value(divergence, s) / (float(derivative(derivative(divergence.f))(torch.ones(()))) * s / 2)


def local_claim() -> Finding:
    """Whether the ratio tends to 1, and how fast."""
    every = generated()
    last = max(abs(ratio(divergence, LOCAL[-1]) - 1) for divergence in every)
    bent = [divergence for divergence in every if abs(ratio(divergence, 0.01) - 1) > EXACT]
    powers = [power((1e-2, 1e-4), [ratio(divergence, s) - 1 for s in (1e-2, 1e-4)]) for divergence in bent]
    return finding(
        "confirmed" if last < 10 * LOCAL[-1] and max(abs(one - 1) for one in powers) < 0.05 else "refuted",
        at=LOCAL[-1],
        last=last,
        powers=span(powers),
    )


def kinks() -> str:
    """The powers of s with which the divergences with a kink fall."""
    spans = ((1.0, 0.1), (0.1, 0.01))
    rows = [
        [f"`{one}`", *(f"{power(ends, [value(one, s) for s in ends]):.2f}" for ends in spans)]
        for one in map(fk.get_divergence, KINKED)
    ]
    return markdown(["divergence", *(f"s = {start:g} to {end:g}" for start, end in spans)], rows)
