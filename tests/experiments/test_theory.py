"""The page of the theory: its numbers against derivations of their own, its verdicts, and the page as it is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import theory
import theory_critic
import theory_gaussian
import torch
from scipy.integrate import quad, solve_ivp, trapezoid
from scipy.optimize import minimize
from scipy.special import expit

import fdu_kernels as fk

DOCS = Path(theory.__file__).parents[1] / "docs"
PAGE = (DOCS / "theory.md").read_text(encoding="utf-8")
Z = np.linspace(-40, 40, 4_001)

KAPPA: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mse": lambda v: 2 + 0 * v,
    "kl": np.exp,
    "reverse_kl": np.ones_like,
    "jeffreys": lambda v: 1 + np.exp(v),
    "pearson_chi2": lambda v: 2 * np.exp(2 * v),
    "neyman_chi2": lambda v: 2 * np.exp(-v),
    "squared_hellinger": lambda v: np.exp(v / 2) / 4,
    "alpha:0.5": lambda v: np.exp(v / 2),
    "jensen_shannon": lambda v: expit(v) / 2,
    "le_cam": lambda v: 4 * expit(v) ** 2 * expit(-v),
    "skew_jensen_shannon:0.3": lambda v: 0.7 * expit(v + math.log(0.3 / 0.7)),
    "shifted_log": lambda v: expit(v) ** 2,
}
"""u^2 f''(u) by v = log u, derived by hand; for mse what makes h(s) = s."""
TERMS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]] = {
    "kl": (lambda v: 1 + v, np.exp),
    "jensen_shannon": (
        lambda v: (math.log(2) - np.logaddexp(0, -v)) / 2,
        lambda v: (np.logaddexp(0, v) - math.log(2)) / 2,
    ),
    "squared_hellinger": (lambda v: (1 - np.exp(-v / 2)) / 2, lambda v: (np.exp(v / 2) - 1) / 2),
    "le_cam": (lambda v: 0.5 - 2 * expit(-v) ** 2, lambda v: 2 * expit(v) ** 2 - 0.5),
}
"""A and B of the variational bound, derived by hand."""


def slope(name: str, s: float) -> float:
    """h'(s) = E[kappa(v)] / 2 with v ~ N(-s/2, s), by the trapezoidal rule."""
    density = np.exp(-(Z**2) / 2) / math.sqrt(2 * math.pi)
    return float(trapezoid(KAPPA[name](math.sqrt(s) * Z - s / 2) * density, Z)) / 2


def cells(heading: str, start: str) -> dict[str, list[str]]:
    """The cells of the table whose header begins so, under a heading of the page, by the name in a row's first cell."""
    rest = PAGE[PAGE.index(f"## {heading}\n") :]
    lines = rest[rest.index(f"| {start} |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


@pytest.fixture(autouse=True)
def as_the_script() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def test_the_gradients_of_the_page_are_those_of_curvatures_derived_by_hand() -> None:
    shown = cells("How large the gradient is", "divergence | h'(0)")
    assert set(shown) == set(KAPPA) | {"total_variation", "hockey_stick:2"}
    for name in KAPPA:
        zero = float(KAPPA[name](np.zeros(()))) / 2
        expected = [zero, *(slope(name, s) / zero for s in theory_gaussian.DISTANCES)]
        assert [float(cell) for cell in shown[name]] == pytest.approx(expected, rel=6e-3)
    # The laws of v at the kink: h' = g n_s(log g) / 2.
    for name, place in (("total_variation", 1.0), ("hockey_stick:2", 2.0)):
        law = [
            math.exp(-((math.log(place) + s / 2) ** 2) / (2 * s)) / math.sqrt(s)
            for s in (*theory_gaussian.DISTANCES, 1.0)
        ]
        assert [float(cell) for cell in shown[name][1:]] == pytest.approx([one / law[-1] for one in law[:-1]], rel=6e-3)


@pytest.mark.parametrize("name", KAPPA)
def test_the_times_of_the_page_are_those_of_an_ode_solver(name: str) -> None:
    zero = slope(name, 1e-12)

    def reached(_: float, s: np.ndarray) -> float:
        return s[0] - theory_gaussian.FLOW_TO

    reached.terminal = True
    solved = solve_ivp(
        lambda _, s: [-4 * s[0] * slope(name, s[0]) / zero],
        (0, 10),
        [theory_gaussian.FLOW_FROM],
        events=reached,
        rtol=1e-8,
        atol=1e-10,
    )
    integral, simulated = map(float, cells("How fast the gradient flow converges", "divergence | time, integral")[name])
    assert integral == pytest.approx(solved.t_events[0][0], abs=6e-5)
    assert simulated == pytest.approx(solved.t_events[0][0], abs=2e-4)


@pytest.mark.parametrize("name", ["mse", "squared_hellinger", "pearson_chi2", "le_cam"])
def test_the_simulated_flow_takes_the_time_of_the_integral(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory_gaussian, "FLOW_TO", 1.0)
    found = theory_gaussian.flow(fk.get_divergence(name))
    assert found["simulated"] == pytest.approx(found["exact"], rel=1e-3)


def test_the_ratios_of_the_page_are_integrals_of_slopes_derived_by_hand() -> None:
    shown = cells("Near s = 0 all divergences coincide", "divergence | s = 1")
    assert set(shown) == set(KAPPA) - {"mse"}, "mse has no generator and says nothing here"
    for name, row in shown.items():
        for s, cell in zip(theory_gaussian.LOCAL, row, strict=True):
            h = s * quad(lambda share, s=s, name=name: slope(name, share * s), 0, 1, epsabs=0, epsrel=1e-8)[0]
            assert float(cell) == pytest.approx(h / (float(KAPPA[name](np.zeros(()))) * s / 2), abs=2e-6)


def fit(name: str, p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """The bound of the true critic and of the best v = a x + b, by another optimiser and without the package."""
    a, b = TERMS[name]
    kappa = KAPPA[name]
    x, y = (np.hstack([law, np.ones((len(law), 1))]) for law in (p, q))

    def minus(weights: np.ndarray) -> tuple[float, np.ndarray]:
        v, w = x @ weights, y @ weights
        grad = x.T @ (np.exp(-v) * kappa(v)) / len(v) - y.T @ kappa(w) / len(w)
        return -float(a(v).mean() - b(w).mean()), -grad

    true = np.zeros(theory_critic.DIMENSIONS + 1)
    true[0], true[-1] = math.sqrt(theory_critic.ESTIMATE_AT), -theory_critic.ESTIMATE_AT / 2
    return -minus(true)[0], -float(minimize(minus, true, jac=True, method="BFGS").fun)


@pytest.mark.parametrize("name", TERMS)
def test_bias_and_spread_of_the_page_at_1024_samples_agree_with_another_derivation(name: str) -> None:
    samples = 1024
    found = []
    for trial in range(theory_critic.TRIALS):
        p, q = theory_critic.draw(samples, torch.Generator().manual_seed(1000 * trial + samples))
        found.append(fit(name, p.numpy(), q.numpy()))
    exact = quad(lambda s: slope(name, s), 0, theory_critic.ESTIMATE_AT)[0]
    row = next(line for line in PAGE.splitlines() if re.match(rf"\| `{name}` \| [\d.]+ \| {samples} \|", line))
    shown = [float(number) for number in re.findall(r"[+-]?\d+\.\d+", row)]
    assert shown[0] == pytest.approx(exact, abs=6e-5)
    for place, values in enumerate(zip(*found, strict=True)):
        bias, spread = np.mean(values) - exact, np.std(values)
        assert shown[1 + 2 * place : 3 + 2 * place] == pytest.approx([bias, spread], abs=1e-4)


@pytest.mark.parametrize("name", TERMS)
def test_the_formulas_of_the_estimate_agree_with_sums_over_samples(name: str) -> None:
    a, b = TERMS[name]
    random = np.random.default_rng(0)
    q = random.standard_normal((200_000, theory_critic.DIMENSIONS))
    p = random.standard_normal((200_000, theory_critic.DIMENSIONS))
    p[:, 0] += 1
    v, w = p[:, 0] - 0.5, q[:, 0] - 0.5
    spread = math.sqrt(a(v).var() + b(w).var())
    x, y = (np.hstack([law, np.ones((len(law), 1))]) for law in (p, q))
    kappa = KAPPA[name]
    scores = np.cov((np.exp(-v) * kappa(v))[:, None] * x, rowvar=False) + np.cov(kappa(w)[:, None] * y, rowvar=False)
    gain = np.trace(np.linalg.solve((kappa(w)[:, None] * y).T @ y / len(w), scores)) / 2
    assert theory_critic.expected(fk.get_divergence(name)) == pytest.approx((spread, gain), rel=0.03)


def made_up(power_of_gain: float, sign_of_loss: float = -1.0) -> theory_critic.Estimates:
    """Estimates as theory has them, save for the power with which the gain falls and the sign of the loss."""
    found: theory_critic.Estimates = {}
    for name in theory_critic.ESTIMATED:
        divergence = fk.get_divergence(name)
        spread, gain = theory_critic.expected(divergence)
        exact = theory_gaussian.value(divergence, theory_critic.ESTIMATE_AT)
        found[name] = {
            str(n): {
                "true": (exact, spread / math.sqrt(n)),
                "gain": (gain / n * (n / theory_critic.SAMPLES[-1]) ** (power_of_gain + 1), 0.0),
                "loss": (sign_of_loss * gain / n, 0.0),
            }
            for n in theory_critic.SAMPLES
        }
    return found


def test_the_verdict_on_the_estimate_follows_the_numbers() -> None:
    assert theory_critic.estimate_claim(made_up(-1.0))["verdict"] == "confirmed"
    for wrong in (made_up(-0.5), made_up(-1.0, sign_of_loss=1.0)):
        assert theory_critic.estimate_claim(wrong)["verdict"] == "refuted in part"
    biased = made_up(-1.0)
    mean, spread = biased["kl"]["256"]["true"]
    biased["kl"]["256"]["true"] = (mean + spread, spread)
    assert theory_critic.estimate_claim(biased)["verdict"] == "refuted in part"
    assert "it is biased" in theory_critic.estimate_claim(biased)["unbiased"]


def test_the_verdict_on_the_flow_follows_the_numbers() -> None:
    def verdict(times: dict[str, float], wrong: float = 1.0) -> str:
        flows = {name: {"exact": time, "simulated": wrong * time} for name, time in times.items()}
        return theory_gaussian.flow_claim(flows)["verdict"]

    times = {"squared_hellinger": 1.29, "mse": 1.15, "pearson_chi2": 0.67}
    assert verdict(times).startswith("confirmed for the flow far from its end, but not near")
    assert verdict(times, wrong=1.01).startswith("refuted")
    assert verdict(dict.fromkeys(times, 1.0)).startswith("refuted")


def test_the_verdicts_on_divergences_follow_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert theory_gaussian.gradient_claim(("pearson_chi2", "mse", "squared_hellinger"))["verdict"].startswith("refuted")
    wrong = theory_gaussian.by_definition
    monkeypatch.setattr(theory_gaussian, "by_definition", lambda divergence, s: wrong(divergence, s) * (1 + 1e-9))
    assert theory_gaussian.kl_claim()["verdict"] == "refuted"
    assert theory_gaussian.alpha_claim()["verdict"].startswith("refuted for alpha = -1, 0.3")
    assert theory_critic.game_claim(made_up(-1.0))["verdict"] == "confirmed in part"
    monkeypatch.setattr(theory_gaussian, "ratio", lambda divergence, s: 1.001 + s)
    assert theory_gaussian.local_claim()["verdict"] == "refuted"


def test_the_table_of_claims_links_to_sections_that_state_them() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    # What GitHub makes of a heading.
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): heading for heading in headings}
    links = re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \| (.+?) \| (.+?) \|$", PAGE, flags=re.MULTILINE)
    assert len(links) == 7 and {link for _, link, _, _ in links} == set(anchors)
    for _, link, source, verdict in links:
        section = PAGE.split(f"## {anchors[link]}\n")[1].split("\n## ")[0]
        assert f"*Claim ({source}): " in section
        assert f"**{verdict[0].upper() + verdict[1:]}.**" in section
