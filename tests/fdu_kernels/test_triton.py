"""The Triton kernels, interpreted on the CPU: golden values, gradients, masks, strides, extremes, repeatability.

Triton decides how to run a kernel when it decorates it. So that other tests see the kernels as they are compiled, the
tests of this file run in processes of their own, which the tests that are collected without TRITON_INTERPRET start: one
for the sample that ``make test`` runs, three for all others.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_testing import check_density_ratio, check_variational, doubled, pairs, sizes_of_terms
from packaging.version import Version
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels import formulas
from fdu_kernels.calls import ExpectationCall, GaussianCall, Kind
from fdu_kernels.critic import ElementFunction
from fdu_kernels.divergence import Function
from fdu_kernels.kernels import triton as backend
from fdu_kernels.kernels.reference import torch_backend as reference
from fdu_kernels.kernels.triton import tuning
from fdu_kernels.profiles import GaussianProfile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REDUCTIONS = ["none", "mean", "sum"]
NARROW = [torch.float16, torch.bfloat16, torch.float32]
NAMES = [name for name in fk.divergences() if name != "mse"]
PARTS = {
    "the sample": ("test_triton.py", "-m", "not slow"),
    "Gaussian losses": ("test_triton.py", "-m", "slow", "-k", "not (ratio or critic or expectation)"),
    "expectations": ("test_triton.py", "-m", "slow", "-k", "ratio or critic or expectation"),
    "properties": ("test_properties.py",),
}
"""The processes of the interpreter: a file and what of it."""
PROFILES = ["mse", "squared_hellinger", "pearson_chi2", "jensen_shannon", "total_variation"]

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.quick(
        dtype=[torch.bfloat16],
        of_pred=[torch.bfloat16],
        of_target=[torch.float32],
        reduction=["mean"],
        size=[7, 100, 601],
        walk=["mixed", "channels_last"],
    ),
]

if INTERPRETED:
    import triton
    import triton.language as tl

    from fdu_kernels.kernels.triton.gaussian import _origin
    from fdu_kernels.kernels.triton.layout import SHIFTED
    from fdu_kernels.kernels.triton.scalars import strided_offsets

    @triton.jit
    def positions(
        out: tl.tensor,
        origin: tl.tensor,
        start: tl.tensor,
        sizes: tl.tuple,
        strides: tl.tuple,
        sample: tl.tensor,
        stride: tl.tensor,
        DIMS: tl.constexpr,
        ALIGN: tl.constexpr,
    ) -> None:
        """Offsets and the origin of a sample as the kernels compute them, without the memory behind them."""
        index = tl.load(start) + tl.arange(0, 4)
        tl.store(out + tl.arange(0, 4), strided_offsets(index, sizes, strides, DIMS))
        begin, lead = _origin(sample + tl.program_id(0), stride, ALIGN, 8)
        tl.store(origin, begin)
        tl.store(origin + 1, lead)


def why_not_interpreted() -> str:
    """Why the interpreter cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    versions = {name: Version(importlib.metadata.version(name)) for name in ("triton", "numpy")}
    if versions["triton"] < Version("3.7") and versions["numpy"] >= Version("2.4"):
        return "the interpreter of Triton 3.6 makes numbers of arrays with one element, which NumPy 2.4 refuses"
    return ""


@pytest.mark.skipif(why_not_interpreted() != "", reason=why_not_interpreted())
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.quick(part=["the sample"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.timeout(900)
def test_interpreted(part: str) -> None:
    file, *options = PARTS[part]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(file))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_says_where_it_runs() -> None:
    if INTERPRETED:
        assert backend.why_unavailable() is None
        assert backend.why_unsuitable(kind("cpu")) is None
    else:
        reason = backend.why_unsuitable(kind("cpu"))
        assert reason is not None and "CUDA" in reason
    for dtypes in ((torch.float64, torch.float32), (torch.float16, torch.float64)):
        reason = backend.why_unsuitable(Kind(torch.device("cpu"), *dtypes, "table"))
        assert reason is not None and "float64" in reason


def kind(device: str, form: str = "exponential", dtype: torch.dtype = torch.float32) -> Kind:
    return Kind(torch.device(device), dtype, dtype, form)


def profile_of(name: str) -> GaussianProfile:
    return fk.get_divergence(name).gaussian_profile


def functions_of(name: str, parametrization: str = "log_ratio") -> tuple[ElementFunction, ElementFunction]:
    first, second = fk.get_divergence(name).critic_functions(parametrization)
    assert isinstance(first, ElementFunction) and isinstance(second, ElementFunction)
    return first, second


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets what PyTorch was built for and which devices there are; the backend's answers are forgotten."""
    answers = (backend._why_unavailable, backend._why_unusable, tuning.target_of)

    def is_now(
        built: str = "cuda",
        capability: tuple[int, int] = (9, 0),
        float64: bool = True,
        counts: tuple[int, int] = (1, 0),
    ) -> None:
        for answer in answers:
            answer.cache_clear()
        for name in ("cuda", "hip", "xpu"):
            monkeypatch.setattr(torch.version, name, "1.0" if name == built else None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: counts[0])
        monkeypatch.setattr(torch.xpu, "device_count", lambda: counts[1])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        warps = SimpleNamespace(warp_size=64)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: warps)
        monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: SimpleNamespace(has_fp64=float64))

    yield is_now
    for answer in answers:
        answer.cache_clear()


def test_takes_a_gpu_by_what_it_is(device: Callable[..., None]) -> None:
    device(capability=(7, 5))
    assert "7.5, below 8.0" in str(backend.why_unsuitable(kind("cuda:0")))
    assert "7.5, below 8.0" in str(backend._why_unavailable(False))
    device(capability=(8, 0))
    assert backend.why_unsuitable(kind("cuda:0")) is None and backend._why_unavailable(False) is None
    # What ROCm calls a capability is that of another numbering.
    device("hip", capability=(1, 0))
    assert backend.why_unsuitable(kind("cuda:0", "table")) is None and backend._why_unavailable(False) is None
    device("xpu", counts=(0, 1))
    assert backend.why_unsuitable(kind("xpu:0", "table")) is None and backend._why_unavailable(False) is None
    device("xpu", float64=False, counts=(0, 1))
    assert "float64" in str(backend.why_unsuitable(kind("xpu:0", "table")))
    assert backend.why_unsuitable(kind("xpu:0")) is None and backend.why_unsuitable(kind("xpu:0", "critic")) is None
    assert backend._why_unavailable(False) is None
    for built, reason in (("cuda", "no CUDA, ROCm or Intel GPU"), ("", "built without CUDA, ROCm and XPU")):
        device(built, counts=(0, 0))
        assert reason in str(backend._why_unavailable(False))
    assert "not on mps" in str(backend.why_unsuitable(kind("mps:0")))
    assert INTERPRETED or "not on cpu" in str(backend.why_unsuitable(kind("cpu")))


def test_launches_as_many_threads_on_every_gpu(device: Callable[..., None]) -> None:
    device()
    assert tuning.target_of(torch.device("cuda:0")).options(32, 64) == {"num_warps": 32, "maxnreg": 64}
    device("hip")
    assert [tuning.target_of(torch.device("cuda:0")).options(warps, 128) for warps in (1, 4, 32)] == [
        {"num_warps": warps} for warps in (1, 2, 16)
    ]
    device("xpu")
    assert tuning.target_of(torch.device("xpu:0")).options(8, 128) == {"num_warps": 8}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", ["cuda", "xpu"])
def test_launches_on_the_device_of_the_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fdu_kernels.kernels.triton.gaussian import launching_on

    entered: list[torch.device] = []
    module = getattr(torch, name)
    monkeypatch.setattr(module, "current_device", lambda: 0)
    monkeypatch.setattr(module, "device", lambda device: entered.append(device) or contextlib.nullcontext())
    for index in (0, 1):
        with launching_on(torch.device(name, index)):
            pass
    assert entered == [torch.device(name, 1)]


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch tables for samples of some hundred elements: the interpreter takes as long for a program of any size."""
    for name, factor in {"ON_CHIP_LIMIT": 64, "STREAM_BLOCK": 16}.items():
        monkeypatch.setattr(tuning, name, {key: size // factor for key, size in getattr(tuning, name).items()})
    sizes = {"ON_CHIP_UNALIGNED_LIMIT": 128, "ON_CHIP_TABLE_LIMIT": 256, "WHOLE_LIMIT": 512, "PARTIALS_BLOCK": 4}
    sizes |= {"EXPECTATION_BLOCK": 64, "TOTAL_BLOCK": 2, "STREAM_MOST_BLOCKS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(tuning, name, size)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """NumPy, which interprets, warns of what the extremes are there for."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def pair(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return pred, target


def units(dtype: torch.dtype) -> float:
    """What one rounding may cost. Interpreted, bfloat16 is cut off instead of rounded."""
    return torch.finfo(dtype).eps


def assert_as_exact(actual: Tensor, truth: Tensor, eager: Tensor, margin: float, terms: float | Tensor = 0.0) -> None:
    """The error against float64 does not exceed the eager one by more than rounding: of the result, which ``margin``
    bounds, and of what it is the sum of, whose size is ``terms``."""
    assert torch.equal(actual.isnan(), eager.isnan())
    actual, eager = actual.double(), eager.double()
    same = (actual == eager) | actual.isnan()
    error, allowed = (actual - truth).abs(), (eager - truth).abs() + margin * truth.abs() + 4e-7 * terms
    tiny = torch.finfo(torch.float32).tiny
    assert bool((same | (error <= allowed + tiny)).all()), ((error - allowed)[~same].max(), actual, truth)


def check_gaussian(
    pred: Tensor,
    target: Tensor,
    name: str = "squared_hellinger",
    sigma: float | Tensor = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    distance: str = "mean",
    reduction: str = "mean",
    grad_scale: float | Tensor = 1.0,
    spread: float = 0.0,
) -> None:
    """Every kernel against the reference in float64; ``spread`` is the largest |k| s."""
    profile = profile_of(name)
    shared = (sigma, weight, mask, distance, reduction, grad_scale)
    call = GaussianCall(pred, target, profile, *shared)
    wide = GaussianCall(*(doubled(argument) for argument in (pred, target, profile, *shared)))
    eager, truth = (reference.gaussian_value_and_grad(each, None) for each in (call, wide))
    call.s = call.room().fill_(math.nan)
    value, grad = backend.gaussian_value_and_grad(call, None)
    margin = 2e-6 * max(1.0, spread)
    eager_s, true_s = (formulas.distance_terms(each)[0] for each in (call, wide))
    assert_as_exact(call.s, true_s, eager_s, 2e-6)
    assert value.shape == eager[0].shape and value.dtype == torch.float32
    assert grad.shape == pred.shape and grad.dtype == pred.dtype
    assert_as_exact(value, truth[0], eager[0], margin)
    assert_as_exact(grad, truth[1], eager[1], margin + units(pred.dtype))

    call.s = call.room().fill_(math.nan)
    losses, coefficients = backend.gaussian_forward(call)
    assert_as_exact(call.s, true_s, eager_s, 2e-6)
    assert losses.shape == coefficients.shape == pred.shape[:1]
    assert_as_exact(losses, reference.gaussian_forward(wide)[0], reference.gaussian_forward(call)[0], margin)
    grad = backend.gaussian_backward(call, coefficients * grad_scale / call.divisor)
    assert grad.dtype == pred.dtype
    assert_as_exact(grad, truth[1], eager[1], margin + units(pred.dtype))


class TestInterpreted:
    """Collected in the process with TRITON_INTERPRET=1 only."""

    __test__ = INTERPRETED

    @pytest.mark.quick(gaussian_row=["kl", "jensen_shannon", "pearson_chi2"])
    def test_golden_values(self, gaussian_row: tuple[str, Tensor, Tensor, Tensor]) -> None:
        name, s, h, slope = gaussian_row
        pred = s.sqrt().float()
        s = pred.double().square()
        divergence = fk.get_divergence(name)
        spread = 1.0 if divergence.exponential is None else max(1.0, abs(divergence.exponential[1]) * float(s.max()))
        call = GaussianCall(pred, torch.zeros_like(pred), divergence.gaussian_profile, reduction="none")
        losses, coefficients = backend.gaussian_forward(call)
        # float32 rounds the square root, too: h moves by s h'.
        torch.testing.assert_close(losses.double(), h, rtol=4e-6 * spread, atol=0)
        torch.testing.assert_close(coefficients.double(), 2 * slope, rtol=4e-6 * spread, atol=1e-44)
        _, grad = backend.gaussian_value_and_grad(call, None)
        torch.testing.assert_close(grad.double(), 2 * pred.double() * slope, rtol=4e-6 * spread, atol=1e-44)

    @pytest.mark.quick(variational_row=["kl", "jensen_shannon", "total_variation"])
    def test_golden_critics(self, variational_row: tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
        name, v, *columns = variational_row
        narrow = v.float()
        for function, value, slope in zip(functions_of(name), columns[:2], columns[2:], strict=True):
            inside = v.abs() <= function.limit
            actual, grad = backend.expectation_value_and_grad(ExpectationCall(narrow, function, reduction="none"))
            for result, truth, eager in (
                (actual, value, function.first.value(narrow)), (grad, slope, function.first.slope(narrow)),
            ):  # fmt: skip
                # v itself is rounded: by as much as A and B move with it.
                shift = (v - narrow.double()).abs() * (truth.abs() + slope.abs())
                error, allowed = (result.double() - truth).abs(), (eager.double() - truth).abs()
                step = name in ("total_variation", "hockey_stick")
                enough = error <= allowed + 2e-6 * truth.abs() + shift + 1e-37
                assert bool((enough | ~inside | (step & (v.abs() < 1e-3))).all()), (name, error - allowed)

    def test_extreme_critics(
        self, extreme_critic: tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    ) -> None:
        name, v, *_ = extreme_critic
        divergence, limits = fk.get_divergence(name), torch.finfo(torch.float32)
        functions = divergence.critic_functions("log_ratio")
        terms = [function.scalar() for function in functions]
        for function, term in zip(functions, terms, strict=True):
            found = backend.expectation_value_and_grad(ExpectationCall(v.float(), function, reduction="none"))
            for actual, exact in zip(found, (term.value_at, term.slope_at), strict=True):
                truth = exact(v.float().double())
                number = truth.abs() >= limits.smallest_normal
                torch.testing.assert_close(actual.double()[number], truth[number], rtol=32 * limits.eps, atol=0)
        (value_a, value_b), exact_v = (term.value_at(v.float().double()) for term in terms), v.float().double()
        for side, size in (
            ("q", (torch.exp(exact_v) * value_a).abs() + value_b.abs()),
            ("p", value_a.abs() + (torch.exp(-exact_v) * value_b).abs()),
        ):
            ratio = divergence.ratio_function(side)
            actual, _ = backend.expectation_value_and_grad(ExpectationCall(v.float(), ratio, reduction="none"))
            error = (actual.double() - ratio.scalar().value_at(exact_v)).abs()
            assert bool((error <= 8 * limits.eps * size + limits.smallest_normal).all())

    @pytest.mark.quick(name=["squared_hellinger", "jensen_shannon"], shape=[(5,), (3, 7), (2, 3, 5, 7)])
    @pytest.mark.parametrize("name", PROFILES)
    @pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (1, 33), (2, 8), (2, 3, 5, 7), (2, 1, 1), (3, 0)])
    def test_shapes(self, name: str, shape: tuple[int, ...]) -> None:
        check_gaussian(*pair(*shape), name, spread=20)

    @pytest.mark.parametrize("name", ["jensen_shannon", "le_cam", "alpha:3", "shifted_log"])
    def test_the_whole_range_of_expectations(self, name: str) -> None:
        size = torch.cat(
            [torch.logspace(-30, 1, 1001), torch.linspace(0.2, 3.0, 1000), torch.linspace(3.0, 86.0, 1000)]
        )
        v = torch.cat([size, -size])
        check_density_ratio("triton", v, name, "q", reduction="none")
        check_variational("triton", v, v.flip(0), name, reduction="none")

    def test_a_split_sample_by_the_launch_tables_of_a_gpu(self) -> None:
        check_gaussian(*pair(2, 40001, dtype=torch.bfloat16), "jensen_shannon", torch.tensor([0.7, 1.3]))

    @pytest.mark.usefixtures("small_tables")
    @pytest.mark.parametrize("dtype", NARROW)
    @pytest.mark.parametrize("size", [600, 601, 1001])
    def test_split_samples(self, dtype: torch.dtype, size: int) -> None:
        pred, target = pair(2, size, dtype=dtype)
        check_gaussian(pred, target, "jensen_shannon", torch.tensor([0.7, 1.3]))
        check_gaussian(pred[:1], target[:1], "pearson_chi2", sigma=2.0, mask=torch.rand(size) > 0.3, spread=2)
        mask = torch.rand(2, size)
        mask[1] = 0
        check_gaussian(pred, target, mask=mask, weight=torch.tensor([0.5, 2.0]).double())

    @pytest.mark.usefixtures("small_tables")
    @pytest.mark.parametrize("of_target", NARROW)
    @pytest.mark.parametrize("of_pred", NARROW)
    def test_pairs_of_dtypes(self, of_pred: torch.dtype, of_target: torch.dtype) -> None:
        # On chip, aligned and not; in parts, of which the second sample is shifted; and layouts of their own.
        for shape in ((2, 3, 16), (3, 37), (2, 601)):
            pred, target = pair(*shape)
            mask = torch.rand(shape[-1]) > 0.3
            check_gaussian(pred.to(of_pred), target.to(of_target), mask=mask, weight=torch.rand(shape[0]))
        pred, target = pair(2, 4, 6, 8)
        pred, target = pred.to(of_pred), target.to(of_target, memory_format=torch.channels_last)
        check_gaussian(pred, target, "jensen_shannon")
        check_gaussian(pred[..., ::2], target[..., ::2], "jensen_shannon")
        # Samples whose distance is a multiple of 16 bytes for one of the two only.
        pred, target = pair(2, 44)
        check_gaussian(pred.to(of_pred)[:, :40], target.to(of_target)[:, :40], "pearson_chi2", spread=10)

    @pytest.mark.quick(name=["squared_hellinger"])
    @pytest.mark.parametrize("name, distance, reduction", pairs(PROFILES, ["mean", "sum"], REDUCTIONS))
    def test_options(self, name: str, distance: str, reduction: str) -> None:
        pred, target = pair(4, 3, 2, 2)
        sigma = torch.tensor([1.5, 1.0, 2.0, 3.0], dtype=torch.float64)
        weight = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.bfloat16)
        mask = torch.rand(4, 1, 2, 2) > 0.3
        mask[3] = False
        scale = torch.tensor(3.0)
        check_gaussian(pred, target, name, sigma, weight, mask, distance, reduction, scale, spread=40)
        check_gaussian(pred, target, name, torch.tensor(1.5).half(), None, None, distance, reduction, 0.5, spread=40)

    @pytest.mark.parametrize(
        "mask",
        [
            torch.rand(2, 1, 6, 5) > 0.5,
            torch.rand(2, 4, 6, 5) > 0.5,
            torch.rand(6, 5),
            torch.rand(2, 4, 1, 1).bfloat16(),
            torch.rand(2, 1, 1, 1).double(),
            torch.rand(4, 1, 5),
            torch.tensor(True),
            torch.rand(2, 6, 5, 4).permute(0, 3, 1, 2),
        ],
        ids=lambda mask: str(list(mask.shape)),
    )
    @pytest.mark.parametrize("walk", ["contiguous", "channels_last", "sliced", "mixed", "expanded"])
    def test_masks_and_strides(self, mask: Tensor, walk: str) -> None:
        pred, target = pair(2, 4, 6, 5, dtype=torch.bfloat16)
        if walk == "channels_last":
            pred, target = (x.to(memory_format=torch.channels_last) for x in (pred, target))
        elif walk == "sliced":
            pred, target = (x[:, ::2, 1:, ::3] for x in pair(2, 8, 7, 15, dtype=torch.bfloat16))
        elif walk == "mixed":
            target = target.to(memory_format=torch.channels_last)
        elif walk == "expanded":
            pred = pred[:1].expand(2, 4, 6, 5)
            target = target[:, :1].expand(2, 4, 6, 5)
        check_gaussian(pred, target, "jensen_shannon", mask=mask)

    def test_a_gradient_keeps_the_layout_or_fills_the_buffer(self) -> None:
        pred, target = (x.to(memory_format=torch.channels_last) for x in pair(2, 4, 6, 5))
        call = GaussianCall(pred, target, profile_of("kl"), reduction="sum")
        _, grad = backend.gaussian_value_and_grad(call, None)
        assert grad.stride() == pred.stride()
        buffer = torch.full((4, 2, 5, 12), math.nan).permute(1, 0, 3, 2)[:, :, ::2]
        _, filled = backend.gaussian_value_and_grad(call, buffer)
        assert filled is buffer and torch.equal(filled, grad)

    def test_more_dimensions_than_the_kernels_take(self) -> None:
        pred, target = (x[:, ::2, ::2, ::2, ::2, ::2, ::2] for x in pair(2, 4, 4, 4, 4, 4, 4))
        check_gaussian(pred, target, mask=torch.rand(2, 1, 2, 1, 2, 1, 2))
        function = fk.get_divergence("kl").ratio_function("q")
        value, grad = backend.expectation_value_and_grad(ExpectationCall(pred, function, reduction="sum"))
        call = ExpectationCall(pred.contiguous(), function, reduction="sum")
        expected = backend.expectation_value_and_grad(call)
        torch.testing.assert_close(value, expected[0])
        torch.testing.assert_close(grad, expected[1])

    @pytest.mark.quick(name=["squared_hellinger", "jensen_shannon"])
    @pytest.mark.parametrize("name", [*PROFILES, "alpha:0.001", "alpha:3.0"])
    def test_extremes(self, name: str) -> None:
        s = torch.tensor([0, 1e-40, 1e-30, 1e-20, 1e-8, 1e-3, 1, 20, 63.9, 64.1, 88, 200, 1e4, 1e10, 1e25])
        pred = torch.cat([s.double().sqrt().float(), torch.tensor([1e20, math.inf, math.nan])])
        divergence = fk.get_divergence(name)
        spread = 64.0 if divergence.exponential is None or divergence.exponential[1] >= 0 else 90.0
        check_gaussian(pred, torch.zeros_like(pred), name, reduction="none", spread=spread)
        losses, _ = backend.gaussian_forward(GaussianCall(pred, torch.zeros_like(pred), profile_of(name)))
        assert bool(losses[-1].isnan()) and not bool(losses[:-1].isnan().any())

    def test_small_distances_keep_their_digits(self) -> None:
        pred = torch.logspace(-15, 0, 12).float()
        for alpha in (0.5, 3.0, 1e-4):
            profile = profile_of(f"alpha:{alpha}")
            losses, _ = backend.gaussian_forward(GaussianCall(pred, torch.zeros_like(pred), profile))
            truth = profile.scalar().value_at(pred.double().square())
            torch.testing.assert_close(losses.double(), truth, rtol=2e-6, atol=0)

    @pytest.mark.usefixtures("small_tables")
    @pytest.mark.parametrize("size", [7, 601])
    def test_a_nan_under_a_zero_mask_is_seen(self, size: int) -> None:
        pred, target = pair(2, size)
        pred[0, 3] = math.nan
        mask = torch.ones(2, size, dtype=torch.bool)
        mask[0, 3] = False
        call = GaussianCall(pred, target, profile_of("kl"), mask=mask, reduction="none")
        value, grad = backend.gaussian_value_and_grad(call, None)
        assert value.isnan().tolist() == [True, False]
        assert bool(grad[0].isnan().all()) and not bool(grad[1].isnan().any())

    @pytest.mark.usefixtures("small_tables")
    @pytest.mark.parametrize("size", [100, 1001])
    def test_bitwise_repeatable(self, size: int) -> None:
        pred, target = pair(3, size, dtype=torch.bfloat16)
        profile = profile_of("jensen_shannon")
        first = backend.gaussian_value_and_grad(GaussianCall(pred, target, profile), None)
        again = backend.gaussian_value_and_grad(GaussianCall(pred.clone(), target.clone(), profile), None)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])

    @pytest.mark.quick(name=["kl", "jensen_shannon"])
    @pytest.mark.parametrize("name, samples_from, reduction", pairs(NAMES, ["q", "p"], REDUCTIONS))
    def test_density_ratios(self, name: str, samples_from: str, reduction: str) -> None:
        function = fk.get_divergence(name).ratio_function(samples_from)
        v = 4 * torch.randn(3, 35, generator=torch.Generator().manual_seed(0))
        v[0, :6] = torch.tensor([0.0, 1e-6, -1e-3, 70.0, -90.0, math.nan])
        check_expectation(v, function, None, reduction, weight=torch.tensor([1.0, 0.0, 2.5]))

    @pytest.mark.quick(name=["kl", "le_cam"])
    @pytest.mark.parametrize("name, parametrization, reduction", pairs(NAMES, ["log_ratio", "fgan"], REDUCTIONS))
    def test_critics(self, name: str, parametrization: str, reduction: str) -> None:
        v = 3 * torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(1))
        first, second = functions_of(name, parametrization)
        check_expectation(v, first, None, reduction)
        check_expectation(v, first, torch.rand(5, 7) > 0.5, reduction)
        check_expectation(v, second, torch.zeros(2, 1, 1, 1), reduction)
        check_expectation(v, second, torch.rand(5, 7) > 0.5, reduction)

    @pytest.mark.usefixtures("small_tables")
    @pytest.mark.parametrize("dtype", NARROW)
    @pytest.mark.parametrize("shape", [(1,), (63,), (128,), (150,), (5, 40, 1), (0,)])
    def test_expectation_sizes(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        function, _ = functions_of("jensen_shannon")
        v = torch.randn(shape).to(dtype)
        for reduction in REDUCTIONS:
            check_expectation(v, function, None, reduction)
        check_expectation(v, function, torch.rand(shape[-1]), "mean")

    @pytest.mark.parametrize("walk", ["channels_last", "sliced"])
    def test_expectation_strides(self, walk: str) -> None:
        v = torch.randn(2, 4, 6, 6)
        v = v.to(memory_format=torch.channels_last) if walk == "channels_last" else v[:, ::2, 1:, ::2]
        function, _ = functions_of("kl")
        for reduction in REDUCTIONS:
            check_expectation(v, function, torch.rand(v.shape[-2:]), reduction)
            check_expectation(v, function, None, reduction)

    def test_positions_past_two_to_the_31(self) -> None:
        start = torch.tensor(3 * 2**31 + 5)
        out, origin = torch.zeros(4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        sizes, strides = (3, 2**31 - 7), (2**32, 5, 2**33 + 1)
        positions[(1,)](out, origin, start, sizes, strides, 70000, 65537 * 9, DIMS=3, ALIGN=SHIFTED)
        for i, found in enumerate(out.tolist()):
            rest, inner = divmod(int(start) + i, sizes[0])
            outer, middle = divmod(rest, sizes[1])
            assert found == inner * strides[0] + middle * strides[1] + outer * strides[2]
        begin = 70000 * 65537 * 9
        assert origin.tolist() == [begin - begin % 8, begin % 8]


def check_expectation(
    v: Tensor, function: Function, mask: Tensor | None, reduction: str, weight: Tensor | None = None
) -> None:
    """Every kernel against the reference in float64."""
    assert isinstance(function, ElementFunction)
    call = ExpectationCall(v, function, weight, mask, reduction, 2.0)
    wide = ExpectationCall(v.double(), function, doubled(weight), doubled(mask), reduction, 2.0)
    value, grad = backend.expectation_value_and_grad(call)
    eager, truth = (reference.expectation_value_and_grad(each) for each in (call, wide))
    assert value.shape == eager[0].shape and grad.shape == v.shape and grad.dtype == v.dtype
    value_terms, grad_terms = sizes_of_terms(function, v)
    factor = formulas._factor(wide, value_terms)
    if factor is not None:
        value_terms, grad_terms = factor * value_terms, factor * grad_terms
    if mask is None or reduction != "mean":
        value_terms = formulas.reduce(value_terms, reduction).nan_to_num()
    else:
        value_terms = value_terms.sum()
    assert_as_exact(value, truth[0], eager[0], 3e-6, value_terms)
    assert_as_exact(grad, truth[1], eager[1], 3e-6 + units(v.dtype), 2 * grad_terms)
    assert torch.equal(backend.expectation_forward(call).nan_to_num(), value.nan_to_num())
    upstream = torch.full(v.shape if reduction == "none" else (), 2.0)
    call.grad_scale = 1.0
    back = backend.expectation_backward(call, upstream)
    assert_as_exact(back, truth[1], eager[1], 3e-6 + units(v.dtype), 2 * grad_terms)
    if reduction == "none":
        spread = torch.tensor(2.0).expand(v.shape)
        assert torch.equal(backend.expectation_backward(call, spread).nan_to_num(), back.nan_to_num())
