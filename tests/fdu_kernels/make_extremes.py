"""Makes vectors/extremes.json: h, h', A, B, A', B', f(r) and f(r)/r where their digits are hard to get.

python tests/fdu_kernels/make_extremes.py (two minutes; needs mpmath, and nothing of the package).

With 110 digits: h = E_q[f(p/q)] by the trapezoidal rule or as a Black-Scholes price, never from h'. What is left of
them is right to 25 digits or more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mpmath as mp

Function = Callable[[mp.mpf], mp.mpf]

SMALLEST = mp.mpf("1e-300")
"""A value below is left out: 0 stands there."""
DISTANCES = (1e-30, 3e-13, 4e-9, 3e-5, 0.011, 0.37, 5.3, 11.3, 29.0, 47.0, 130.0, 613.7, 803.1, 1087.0, 3e3, 5e3)
FALLS = (690.0, 560.0, 360.0, 170.0, 60.0, 17.0, 3.1, 0.6, 0.01)
"""Of (log g)^2/(2 s): by e to the power of minus this a kink's density has fallen."""
KINKS = (1.000001, 0.999999, 1.001, 0.999, 1.000000001, 0.999999999999, 1.000000000000001, 2.0, 0.5, 20.0, 0.01)
RATIOS = (1e-30, 2.3e-8, 0.003, 0.4, 3.0, 17.0, 30.0)
"""Of abs(v)."""


def jensen_shannon(u: mp.mpf) -> mp.mpf:
    return (u * mp.log(u) - (u + 1) * mp.log((u + 1) / 2)) / 2


def shifted_log(u: mp.mpf) -> mp.mpf:
    return mp.log(2 / (u + 1))


def le_cam(u: mp.mpf) -> mp.mpf:
    return (u - 1) ** 2 / (2 * (u + 1))


def skew_jensen_shannon(w: float) -> tuple[Function, Function]:
    share = mp.mpf(w)

    def f(u: mp.mpf) -> mp.mpf:
        mean = share * u + 1 - share
        return share * u * mp.log(u) - mean * mp.log(mean)

    return f, lambda u: share * (1 - share) * u / (share * u + 1 - share)


SMOOTH: dict[str, tuple[Function, Function]] = {
    "jensen_shannon": (jensen_shannon, lambda u: u / (2 * (u + 1))),
    "shifted_log": (shifted_log, lambda u: (u / (u + 1)) ** 2),
    "le_cam": (le_cam, lambda u: 4 * u**2 / (u + 1) ** 3),
    **{f"skew_jensen_shannon:{w!r}": skew_jensen_shannon(w) for w in (1e-6, 1e-9, 1 - 1e-6, 0.3)},
}
"""f(u) and kappa = u^2 f''(u)."""
OTHERS: dict[str, Function] = {
    "kl": lambda u: u * mp.log(u),
    "reverse_kl": lambda u: -mp.log(u),
    "jeffreys": lambda u: (u - 1) * mp.log(u),
    "pearson_chi2": lambda u: (u - 1) ** 2,
    "neyman_chi2": lambda u: (1 - u) ** 2 / u,
    "squared_hellinger": lambda u: (mp.sqrt(u) - 1) ** 2 / 2,
    "alpha:0.3": lambda u: (u ** mp.mpf(0.3) - mp.mpf(0.3) * u + mp.mpf(0.3) - 1) / (mp.mpf(0.3) * (mp.mpf(0.3) - 1)),
}


def expectation(f: Function, s: mp.mpf) -> mp.mpf:
    """E[f(e^v)], v ~ N(-s/2, s): exponentially exact, as the poles of f(e^v) lie at least pi from the real line."""
    root = mp.sqrt(s)
    step = min(root / 2, mp.mpf("0.3"))
    # f(e^v) grows like e^v at most, which moves the mass to s/2.
    ends = -s / 2 - 13 * root, s / 2 + 13 * root
    total = mp.mpf(0)
    for index in range(int(mp.floor(ends[0] / step)), int(mp.ceil(ends[1] / step)) + 1):
        v = index * step
        total += f(mp.exp(v)) * mp.exp(-((v + s / 2) ** 2) / (2 * s))
    return total * step / mp.sqrt(2 * mp.pi * s)


def price(g: mp.mpf, s: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """h and h' of max(u - g, 0) - max(1 - g, 0), a Black-Scholes price."""
    root = mp.sqrt(s)
    d = -mp.log(g) / root + root / 2
    sign = 1 if g >= 1 else -1
    with mp.workdps(400):
        h = sign * (mp.ncdf(sign * d) - g * mp.ncdf(sign * (d - root)))
    return h, g * mp.npdf(d - root) / (2 * root)


def number(value: mp.mpf) -> float:
    return float(value) if abs(value) >= SMALLEST else 0.0


def profiles() -> dict[str, list[list[float]]]:
    rows: dict[str, list[list[float]]] = {}
    for name, (f, kappa) in SMOOTH.items():
        rows[name] = []
        for distance in DISTANCES:
            s = mp.mpf(distance)
            h = expectation(f, s)
            rows[name].append([distance, number(h), number(expectation(kappa, s) / 2)])
    for place in (1.0, *KINKS):
        log = mp.log(mp.mpf(place))
        falls = [float(log**2 / (2 * mp.mpf(fall))) for fall in FALLS] if place != 1 else []
        name = "total_variation" if place == 1 else f"hockey_stick:{place!r}".removesuffix(".0")
        distances = sorted({s for s in (*falls, 1e-28, 3e-6, 1.3, 90.0, 700.0, 5e3) if s >= 1e-30})
        values = [(s, *price(mp.mpf(place), mp.mpf(s))) for s in distances]
        rows[name] = [[s, number(h), number(slope)] for s, h, slope in values if slope >= SMALLEST]
    return rows


def ratios() -> dict[str, list[list[float]]]:
    """v, A, B, A', B', f(r), f(r)/r."""
    rows: dict[str, list[list[float]]] = {}
    for name, f in {**OTHERS, **{name: f for name, (f, _) in SMOOTH.items()}}.items():
        rows[name] = []
        for size in RATIOS:
            for at in (-size, size):
                v = mp.mpf(at)
                with mp.workdps(250):
                    u = mp.exp(v)
                    a = mp.diff(f, u)
                    kappa = u * u * mp.diff(f, u, 2)
                    values = a, u * a - f(u), kappa / u, kappa, f(u), f(u) / u
                    rows[name].append([at, *(number(value) for value in values)])
    return rows


def main() -> None:
    mp.mp.dps = 110
    groups = {"profiles": profiles(), "ratios": ratios()}
    lines = []
    for group, rows in groups.items():
        blocks = [
            f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in table) + "\n  ]"
            for name, table in rows.items()
        ]
        lines.append(f' "{group}": {{\n' + ",\n".join(blocks) + "\n }")
    target = Path(__file__).parent / "vectors" / "extremes.json"
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
