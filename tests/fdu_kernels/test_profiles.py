"""Gaussian profiles against golden values, closed forms and 30-digit quadrature; the table's interpolation error."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref

import mpmath
import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fdu_kernels as fk
from fdu_kernels import profiles
from fdu_kernels.profiles import HEADER_ROWS, GaussianProfile
from fdu_kernels.scalar import MAX_EXPONENT
from fdu_kernels.tabulation import log_slope_by_quadrature

TABULATED = ["jensen_shannon", "total_variation", "le_cam", "skew_jensen_shannon:0.3", "shifted_log"]


def test_golden_values(gaussian_row: tuple[str, Tensor, Tensor, Tensor]) -> None:
    name, s, h, slope = gaussian_row
    divergence = fk.get_divergence(name)
    s = s.clone().requires_grad_()
    value = divergence.profile(s)
    (grad,) = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(value.detach(), h, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, slope, rtol=1e-12, atol=0)
    torch.testing.assert_close(divergence.profile_grad(s).detach(), slope, rtol=1e-12, atol=0)


def test_extremes(extreme_profile: tuple[str, Tensor, Tensor, Tensor]) -> None:
    name, s, *columns = extreme_profile
    divergence = fk.get_divergence(name)
    for function, truth in zip((divergence.profile, divergence.profile_grad), columns, strict=True):
        number = truth > 0
        torch.testing.assert_close(function(s)[number], truth[number], rtol=5e-12, atol=0)
        assert bool((function(s)[~number] < 1e-299).all())
        # float32 is that, rounded once.
        torch.testing.assert_close(function(s.float()), function(s.float().double()).float(), rtol=0, atol=0)


@pytest.mark.quick(g=[20.0, 0.9, 1.000000001])
@pytest.mark.parametrize("jump", [1.0, 1e-3])
@pytest.mark.parametrize("g", [20.0, 2.0, 0.9, 1.001, 0.999999, 1.000000001, 0.999999999999])
def test_a_kink_beside_a_curvature(g: float, jump: float) -> None:
    smooth, kinked = fk.get_divergence("squared_hellinger"), fk.get_divergence("hockey_stick", g=g)
    both = dataclasses.replace(smooth, name=f"with a kink at {g}: {jump}", exponential=None, kinks=((g, jump),))
    s = torch.logspace(-29.9, 3.3, 1001, dtype=torch.float64)
    for own, one, other in (
        (both.profile, smooth.profile, kinked.profile), (both.profile_grad, smooth.profile_grad, kinked.profile_grad),
    ):  # fmt: skip
        torch.testing.assert_close(own(s), one(s) + jump * other(s), rtol=5e-12, atol=0)


@pytest.mark.parametrize("g", [0.01, 2.0, 1.000001])
def test_a_users_kinks_alone(g: float) -> None:
    own = fk.get_divergence("hockey_stick", g=g)
    mine = fk.Divergence.from_generator(lambda u: torch.clamp(u - g, min=0) - max(1 - g, 0), kinks=(g,))
    s = torch.logspace(-20, 4, 301, dtype=torch.float64)
    # The jump is a difference of slopes.
    torch.testing.assert_close(mine.profile(s), own.profile(s), rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(mine.profile_grad(s), own.profile_grad(s), rtol=1e-11, atol=1e-300)


@pytest.mark.parametrize("name", [name for name in fk.divergences() if name != "mse"])
def test_tables_reproduce_elementary_profiles_and_quadrature(name: str) -> None:
    # From the curvature alone; for the elementary ones this compares (c, k) with f''.
    divergence = fk.get_divergence(name)
    s = torch.logspace(-8, math.log10(50), 333, dtype=torch.float64)
    slopes = torch.exp(log_slope_by_quadrature(divergence.log_curvature, divergence.kinks, s))
    representable = slopes > 1e-300
    torch.testing.assert_close(
        slopes[representable],
        divergence.profile_grad(s)[representable],
        rtol=1e-11,
        atol=0,
    )


@pytest.mark.parametrize("name", [*TABULATED, "skew_jensen_shannon:1e-09", "skew_jensen_shannon:1e-30"])
def test_interpolation_error(name: str) -> None:
    divergence = fk.get_divergence(name)
    # Between the grid's points, as far as h' is a normal number in float64.
    s = torch.exp(torch.linspace(math.log(1e-8), math.log(5000), 501, dtype=torch.float64) + 0.0031)
    exact = log_slope_by_quadrature(divergence.log_curvature, divergence.kinks, s)
    normal = exact > -700
    torch.testing.assert_close(divergence.profile_grad(s)[normal], torch.exp(exact)[normal], rtol=1e-11, atol=0)
    assert bool((divergence.profile_grad(s)[~normal] < 1e-300).all())
    assert divergence.profile(torch.tensor(1e4, dtype=torch.float64)).item() == pytest.approx(
        divergence.upper, rel=1e-12
    )


@pytest.mark.parametrize("s", [1e-8, 0.003, 0.7, 11.0, 60.0])
def test_h_of_le_cam_against_mpmath(s: float) -> None:
    with mpmath.workdps(30):

        def integrand(z: mpmath.mpf) -> mpmath.mpf:
            u = mpmath.exp(mpmath.sqrt(s) * z - mpmath.mpf(s) / 2)
            return (u - 1) ** 2 / (2 * (u + 1)) * mpmath.npdf(z)

        center = math.sqrt(s)
        expected = float(mpmath.quad(integrand, mpmath.linspace(-12 - center, 12 + center, 25)))
    assert fk.get_divergence("le_cam").profile(torch.tensor(s, dtype=torch.float64)).item() == pytest.approx(
        expected, rel=1e-11
    )


@pytest.mark.parametrize("g", [0.5, 1.0, 1.5, 2.0])
def test_hockey_stick_is_a_black_scholes_price(g: float) -> None:
    s = torch.tensor([0.05, 0.3, 1.0, 4.0, 30.0], dtype=torch.float64)
    root = s.sqrt().numpy()
    d = -math.log(g) / root + root / 2
    sign = 1 if g >= 1 else -1
    price = sign * (norm.cdf(sign * d) - g * norm.cdf(sign * (d - root)))
    divergence = fk.get_divergence("hockey_stick", g=g)
    torch.testing.assert_close(divergence.profile(s), torch.from_numpy(price), rtol=1e-9, atol=1e-15)  # as SciPy rounds
    expected = torch.from_numpy(norm.pdf(d) / (2 * root))
    torch.testing.assert_close(divergence.profile_grad(s), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", fk.divergences())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends(name: str, dtype: torch.dtype) -> None:
    divergence = fk.get_divergence(name)
    s = torch.tensor([0.0, 1e-38, 1e-20, 1e-6, 1.0, 1e3, 1e6, 1e9], dtype=dtype)
    h, slope = divergence.profile(s), divergence.profile_grad(s)
    assert bool(torch.isfinite(h).all()) and bool(torch.isfinite(slope).all())
    assert h[0] == 0
    assert bool((h[1:] >= h[:-1]).all())
    if 0 < divergence.slope_at_zero < math.inf:
        torch.testing.assert_close(h[2] / s[2], torch.tensor(divergence.slope_at_zero, dtype=dtype), rtol=1e-6, atol=0)
        torch.testing.assert_close(slope[0], torch.tensor(divergence.slope_at_zero, dtype=dtype), rtol=1e-6, atol=0)
    nan = torch.tensor([math.nan, 1.0], dtype=dtype)
    assert divergence.profile(nan).isnan().tolist() == [True, False]
    assert divergence.profile_grad(nan).isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["pearson_chi2", "alpha:2", "alpha:-1.5"])
def test_straight_line_beyond_the_largest_exponent(name: str) -> None:
    divergence = fk.get_divergence(name)
    assert divergence.exponential is not None
    c, k = divergence.exponential
    end = MAX_EXPONENT / k
    s = torch.tensor([end * 0.999, end, 1.5 * end, 2 * end], dtype=torch.float64)
    h, slope = divergence.profile(s), divergence.profile_grad(s)
    assert h[0].item() == pytest.approx(c * math.expm1(k * s[0].item()) / k, rel=1e-12)
    assert slope[1] == slope[2] == slope[3]
    assert slope[1].item() == pytest.approx(c * math.exp(MAX_EXPONENT), rel=1e-12)
    torch.testing.assert_close((h[3] - h[2]) / (s[3] - s[2]), slope[3], rtol=1e-12, atol=0)
    torch.testing.assert_close((h[2] - h[1]) / (s[2] - s[1]), slope[3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["squared_hellinger", "pearson_chi2", "kl", *TABULATED, "hockey_stick:2"])
def test_derivatives(name: str) -> None:
    s = torch.tensor([0.2, 0.9, 3.0, 9.0], dtype=torch.float64, requires_grad=True)
    h = fk.get_divergence(name).gaussian_profile.scalar()
    assert gradcheck(h, (s,))
    assert gradgradcheck(h, (s,))


@pytest.mark.quick(name=["kl", "jensen_shannon", "total_variation"])
@pytest.mark.parametrize(
    "name",
    ["kl", "reverse_kl", "jeffreys", "alpha:1.1", "alpha:0.5", "alpha:-0.5", "squared_hellinger", "le_cam",
     "jensen_shannon", "shifted_log", "neyman_chi2", "total_variation", "skew_jensen_shannon"],
)  # fmt: skip
def test_a_users_generator_equals_the_catalogue_at_every_s(name: str) -> None:
    own = fk.get_divergence(name)
    assert own.generator is not None
    mine = fk.Divergence.from_generator(own.generator)
    s = torch.logspace(-6, 4, 301, dtype=torch.float64)
    if own.exponential is not None and own.exponential[1] > 0:
        # Beyond, both are straight lines, which begin at slightly different s.
        s = s[own.exponential[1] * s < MAX_EXPONENT - 0.5]
    torch.testing.assert_close(mine.profile(s), own.profile(s), rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.profile_grad(s), own.profile_grad(s), rtol=1e-5, atol=1e-200)


def test_the_table_ends_where_a_users_curvature_is_unknown() -> None:
    # kappa = u^2 (2 log(1 + u) + 2)/(1 + u) is no power of u far out.
    def f(u: Tensor) -> Tensor:
        return (1 + u) * torch.log1p(u) ** 2 - 2 * math.log(2) ** 2

    mine = fk.Divergence.from_generator(f)
    s = torch.tensor([1.0, 10.0, 60.0], dtype=torch.float64)
    # Under p, v is normal with mean +s/2: h = E_p[f(u)/u], free of overflow.
    z = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    v = s[:, None] / 2 + s.sqrt()[:, None] * z
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    expected = torch.trapezoid(density * f(torch.exp(v)) * torch.exp(-v), z)
    torch.testing.assert_close(mine.profile(s), expected, rtol=1e-8, atol=0)
    end = mine.gaussian_profile.linear_beyond
    assert 60 < end < 300
    beyond = torch.tensor([end, 2 * end, 1e6], dtype=torch.float64)
    h, slope = mine.profile(beyond), mine.profile_grad(beyond)
    assert slope[0] == slope[1] == slope[2] > 0
    torch.testing.assert_close(h[2] - h[0], slope[0] * (beyond[2] - beyond[0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", fk.divergences())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_distance(name: str, dtype: torch.dtype) -> None:
    divergence = fk.get_divergence(name)
    s = torch.tensor([math.inf, math.nan], dtype=dtype, requires_grad=True)
    h, slope = divergence.profile(s), divergence.profile_grad(s)
    assert h[0].item() == pytest.approx(divergence.upper, rel=1e-6)
    assert slope[0].item() == pytest.approx(divergence.profile_grad(torch.tensor(1e30, dtype=dtype)).item())
    assert math.isfinite(slope[0].item()) and bool(h[1].isnan()) and bool(slope[1].isnan())


@pytest.mark.parametrize("name", [*TABULATED, "hockey_stick:2"])
def test_devices_without_float64_read_in_float32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    divergence = fk.get_divergence(name)
    s = torch.logspace(-6, 2, 401)
    exact = divergence.profile(s.double()), divergence.profile_grad(s.double())
    made = []
    monkeypatch.setattr(GaussianProfile, "table_on", lambda profile, device: profile.table.float())
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "double", lambda tensor: made.append(tensor))
        single = divergence.profile(s), divergence.profile_grad(s)
        ends = divergence.profile(torch.tensor([0.0, 1e-38, math.inf, math.nan]))
    assert not made and single[0].dtype == torch.float32
    for found, expected in zip(single, exact, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=3e-5, atol=1e-12)
    assert ends[0] == 0 and 0 <= ends[1] < 1e-18 and ends[3].isnan()
    assert ends[2].item() == pytest.approx(divergence.upper, rel=1e-5)


def test_tables_are_made_on_the_cpu() -> None:
    def f(u: Tensor) -> Tensor:
        return (u - 1) ** 2 / (u + 1)

    with torch.device("meta"):
        mine = fk.Divergence.from_generator(f)
        assert mine.slope_at_zero == 0.5
        assert mine.gaussian_profile.table.device.type == "cpu"


def test_tables_stay_small() -> None:
    for name in ("jensen_shannon", "hockey_stick:1.000000000000001", "hockey_stick:0.01", "skew_jensen_shannon:1e-30"):
        assert len(fk.get_divergence(name).gaussian_profile.table) <= 5000
    kink = (0.999999999999, 1.0)
    both = dataclasses.replace(fk.get_divergence("squared_hellinger"), name="both", exponential=None, kinks=(kink,))
    assert len(both.gaussian_profile.table) <= 40_000


def test_table_is_built_once_and_says_where_it_stands() -> None:
    profile = fk.get_divergence("jensen_shannon").gaussian_profile
    assert fk.get_divergence("js").gaussian_profile is profile
    table, grid = profile.table, profile.grid
    assert table is not None and grid is not None and table.dtype == torch.float64 and table.is_contiguous()
    assert table[:HEADER_ROWS].flatten().tolist() == [*grid[:4], *grid.powers, grid.linear_beyond, 1e-30]
    row = grid.bottom + 100
    s = torch.exp(torch.tensor(grid.first + row * grid.step, dtype=torch.float64))
    expected = torch.stack([fk.get_divergence("js").profile(s), fk.get_divergence("js").profile_grad(s)]).log()
    torch.testing.assert_close(table[HEADER_ROWS + row], expected, rtol=1e-13, atol=0)
    assert profile.table_on(torch.device("cpu")) is table
    on_meta = profile.table_on(torch.device("meta"))
    assert on_meta is profile.table_on(torch.device("meta")) and on_meta is not None and on_meta.is_meta


def test_a_table_that_a_graph_reads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    device, tables = torch.device("meta"), []
    monkeypatch.setattr(profiles, "_CAPTURED", set())
    for capturing in (False, True):
        profile = fk.Divergence.from_generator(lambda u: (u - 1) ** 2 / (u + 3)).gaussian_profile
        with monkeypatch.context() as patch:
            patch.setattr(profiles, "is_capturing", lambda _: True)
            with pytest.raises(RuntimeError, match="capture.*meta.*warm_up"):
                profile.table_on(device)
        profile.table_on(device)
        with monkeypatch.context() as patch:
            patch.setattr(profiles, "is_capturing", lambda _, capturing=capturing: capturing)
            tables.append(weakref.ref(profile.table_on(device)))
        del profile
        gc.collect()
    assert tables[0]() is None and tables[1]() is not None


def test_a_capture_may_follow_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    divergence = fk.Divergence.from_generator(lambda u: (u - 1) ** 2 / (u + 3))
    pred, target = torch.empty(2, 3, 4, 5, device="meta").unbind()
    fk.warm_up(pred, target, divergence, sigma=0.5, reduction="none")
    monkeypatch.setattr(profiles, "is_capturing", lambda _: True)
    monkeypatch.setattr(profiles, "_CAPTURED", set())
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, divergence)
    assert value.is_meta and grad.shape == pred.shape and pred.grad is None


@pytest.mark.parametrize("name", [name for name in fk.divergences() if fk.get_divergence(name).exponential])
def test_elementary_profiles_are_numbers(name: str) -> None:
    profile, exponential = fk.get_divergence(name).gaussian_profile, fk.get_divergence(name).exponential
    assert (profile.c, profile.k) == exponential and profile.table_on(torch.device("cpu")) is None
    assert profile.linear_beyond == (MAX_EXPONENT / profile.k if profile.k > 0 else math.inf)


@pytest.mark.parametrize("circumstance", ["inference", "fake", "functionalize", "vmap", "default device"])
def test_a_table_made_in_any_circumstances_serves_in_all(circumstance: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    w = 0.11 + 0.01 * len(circumstance)
    divergence = fk.get_divergence("skew_jensen_shannon", w=w)
    s = torch.tensor([0.5, 2.0])
    if circumstance == "inference":
        with torch.inference_mode():
            divergence.profile(s)
    elif circumstance == "fake":
        with FakeTensorMode():
            fk.gaussian_divergence(torch.ones(2, 3), torch.ones(2, 3), divergence, backend="torch")
    elif circumstance == "default device":
        with torch.device("meta"):
            divergence.profile(torch.ones(2))
    else:
        transform = getattr(torch.func, circumstance)
        transform(divergence.profile)(s)
    again = torch.autograd.functional.jacobian(divergence.profile, s).diagonal()
    torch.testing.assert_close(again, divergence.profile_grad(s))
