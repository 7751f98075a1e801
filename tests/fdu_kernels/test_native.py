"""The compiled kernels for the CPU on every instruction set: accuracy, layouts, sizes, extremes, repeatability."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kernel_testing import (
    assert_within,
    check_density_ratio,
    check_gaussian,
    check_variational,
    condition,
    element_bounds,
    laid_out,
    pair,
    pairs,
    unit,
)
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels import build
from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.kernels.native import cpu

REASON = fk.backends()["cpu"]
SETS = () if REASON else build.load().instruction_sets()
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NARROW = [torch.float16, torch.bfloat16]
REDUCTIONS = ["none", "mean", "sum"]
PROFILES = ["mse", "squared_hellinger", "pearson_chi2", "alpha:0.3", "jensen_shannon", "total_variation"]
CRITICS = [name for name in fk.divergences() if name != "mse"]
# Around the vectors, lanes, chunks (512, 1024), groups (16384) and grains (32768) of csrc/.
SIZES = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 511, 512, 513, 1023, 1024, 1025, 1087, 2049]
SIZES += [16383, 16384, 16385, 16447, 32767, 32768, 32769, 49153, 65535, 65537]

pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.quick(instruction_set=SETS[-1:] or ["none"]),
]
on_every_set = functools.partial(pytest.mark.parametrize, indirect=["instruction_set"], ids=str)


@pytest.fixture(params=SETS or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    module = build.load()
    before = module.instruction_set()
    module.use_instruction_set(request.param)
    yield request.param
    module.use_instruction_set(before)


def test_an_instruction_set_is_chosen_by_name(instruction_set: str) -> None:
    assert build.load().instruction_set() == instruction_set
    with pytest.raises(ValueError, match="not.*instruction set.*machine: sse9"):
        build.load().use_instruction_set("sse9")
    assert build.load().instruction_set() == instruction_set


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_values(
    instruction_set: str, gaussian_row: tuple[str, Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    name, s, h, slope = gaussian_row
    # pred - target = 1, so that s = 1 / sigma^2 is the golden one to the last digit of float64.
    pred = torch.ones(len(s), dtype=dtype)
    value, grad = fk.gaussian_divergence_value_and_grad(
        pred, torch.zeros_like(pred), name, sigma=s.rsqrt(), reduction="none", backend="cpu"
    )
    relative = unit(dtype) * condition(fk.get_divergence(name), s)
    assert_within(value, h, relative * h.abs())
    assert_within(grad, 2 * s * slope, relative * (2 * s * slope).abs())


def test_extreme_profiles(instruction_set: str, extreme_profile: tuple[str, Tensor, Tensor, Tensor]) -> None:
    name, s, h, slope = extreme_profile
    pred = torch.ones(len(s), dtype=torch.float64)
    value, grad = fk.gaussian_divergence_value_and_grad(
        pred, torch.zeros_like(pred), name, sigma=s.rsqrt(), reduction="none", backend="cpu"
    )
    for found, truth in ((value, h), (grad, 2 * s * slope)):
        number = truth > 1e-300
        torch.testing.assert_close(found[number], truth[number], rtol=5e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_critics(
    instruction_set: str,
    extreme_critic: tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> None:
    name, v, *columns = extreme_critic
    divergence, limits, narrow = fk.get_divergence(name), torch.finfo(dtype), v.to(dtype)
    for function, value, slope in zip(divergence.critic_functions("log_ratio"), columns[:2], columns[2:4], strict=True):
        truths, term = (value, slope), function.scalar()
        if dtype == torch.float32:
            truths = term.value_at(narrow.double()), term.slope_at(narrow.double())
        found = cpu.expectation_value_and_grad(ExpectationCall(narrow, function, reduction="none"))
        for actual, truth in zip(found, truths, strict=True):
            number = truth.abs() >= limits.smallest_normal
            torch.testing.assert_close(actual.double()[number], truth[number], rtol=32 * limits.eps, atol=0)
    size = (torch.exp(v) * columns[0]).abs() + columns[1].abs()
    for truth, side in zip(columns[4:], "qp", strict=True):
        function = divergence.ratio_function(side)
        if dtype == torch.float32:
            truth = function.scalar().value_at(narrow.double())
        actual, _ = cpu.expectation_value_and_grad(ExpectationCall(narrow, function, reduction="none"))
        bound = 8 * limits.eps * size * (1.0 if side == "q" else torch.exp(-v)) + limits.smallest_normal
        assert bool(((actual.double() - truth).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_critics(
    instruction_set: str, variational_row: tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    name, v, *columns = variational_row
    functions = fk.get_divergence(name).critic_functions("log_ratio")
    narrow = v.to(dtype)
    bounds = []
    for function, value, slope in zip(functions, columns[:2], columns[2:], strict=True):
        value_bound, slope_bound = element_bounds(function, narrow)
        found = cpu.expectation_value_and_grad(ExpectationCall(narrow, function, reduction="none"))
        # float32 rounds v itself; the truth moves with it.
        moved = value + slope * (narrow.double() - v)
        assert_within(found[0], moved, value_bound + 1e-9 * (narrow.double() - v).abs())
        assert_within(found[1], slope, slope_bound + slope.abs() * unit(dtype))
        bounds.append(value_bound + (slope * (narrow.double() - v)).abs())
    bound, grad_p, grad_q = fk.variational_divergence_value_and_grad(
        narrow, narrow, name, reduction="none", backend="cpu"
    )
    assert_within(bound, columns[0] - columns[1], sum(bounds))
    for function, grad, slope in zip(functions, (grad_p, -grad_q), columns[2:], strict=True):
        assert_within(grad, slope, element_bounds(function, narrow)[1] + slope.abs() * unit(dtype))


@on_every_set("instruction_set, name, dtype", pairs(SETS, fk.divergences(), DTYPES))
def test_every_divergence_and_dtype(instruction_set: str, name: str, dtype: torch.dtype) -> None:
    pred, target = pair(5, 3, 7, 11, dtype=dtype)
    check_gaussian("cpu", pred, target, name, grad_scale=256.0)
    if name != "mse":
        check_variational("cpu", 3 * pred, 3 * target, name, grad_scale=256.0)
        for samples_from in ("q", "p"):
            check_density_ratio("cpu", 3 * pred, name, samples_from, grad_scale=256.0)


@on_every_set("instruction_set, of_pred, of_target", pairs(SETS, DTYPES, DTYPES))
def test_every_pair_of_dtypes(instruction_set: str, of_pred: torch.dtype, of_target: torch.dtype) -> None:
    for size in (1, 7, 65, 1025, 2 * 16384 + 33):
        pred, target = pair(3, size)
        pred, target = pred.to(of_pred), target.to(of_target)
        mask = torch.rand(size, generator=torch.Generator().manual_seed(1))
        check_gaussian("cpu", pred, target, "squared_hellinger", grad_scale=64.0 * size)
        for of_mask in (torch.bool, torch.float16, torch.float64):
            check_gaussian("cpu", pred, target, "jensen_shannon", mask=(mask + 0.3).to(of_mask), reduction="sum")


@pytest.mark.parametrize(
    "of_pred, of_target, moved, layout", pairs(DTYPES, DTYPES, range(4), ["permuted", "sliced", "offset"]), ids=str
)
def test_layouts_and_threads_of_every_pair_of_dtypes(
    of_pred: torch.dtype, of_target: torch.dtype, moved: int, layout: str
) -> None:
    pred, target = pair(3, 2, 99, 175)  # a sample is more than a grain
    mask = torch.rand(3, 1, 99, 175, generator=torch.Generator().manual_seed(1))
    operands = [pred.to(of_pred), target.to(of_target), mask, torch.full_like(pred, math.nan, dtype=of_pred)]
    operands[moved] = laid_out(operands[moved], layout)
    a, b, m, buffer = operands
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(fk.gaussian_divergence_value_and_grad(a, b, mask=m, grad_out=buffer.clone(), backend="cpu"))
    check_gaussian("cpu", a, b, mask=m, grad_scale=2.0**10, grad_out=buffer)
    for other in results[1:]:
        assert all(torch.equal(one, same) for one, same in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_of_doubles_is_rounded_once(instruction_set: str, dtype: torch.dtype) -> None:
    # A little beside the middle of two numbers, by less than float32 sees; subnormal, normal and large ones.
    bits = torch.cat([torch.arange(1, 50), torch.arange(1, 30_000, 37)]).to(torch.int16)
    below, above = bits.view(dtype).double(), (bits + 1).view(dtype).double()
    below, above = below[above.isfinite()], above[above.isfinite()]
    middle = (below + above) / 2
    for sign in (-1, 1):
        for nearer, factor in ((below, 1 - 2.0**-40), (above, 1 + 2.0**-40)):
            pred = torch.zeros_like(middle, dtype=dtype)
            _, grad = fk.gaussian_divergence_value_and_grad(
                pred, -sign * middle * factor, "mse", reduction="none", backend="cpu", grad_scale=0.5
            )
            assert torch.equal(grad.double(), sign * nearer)
    huge = torch.tensor([1e300, -1e300, math.inf, math.nan], dtype=torch.float64)
    _, grad = fk.gaussian_divergence_value_and_grad(
        torch.zeros(4, dtype=dtype), -huge, "kl", reduction="none", backend="cpu"
    )
    assert torch.equal(grad.nan_to_num(7.0, 1.0, -1.0), torch.tensor([1, -1, 1, 7], dtype=dtype))


@on_every_set("instruction_set, name, dtype", pairs(SETS, PROFILES, NARROW))
def test_narrow_gradients_are_no_worse_than_eager_ones_rounded_once(
    instruction_set: str, name: str, dtype: torch.dtype
) -> None:
    pred, target = pair(4, 4, 32, 32, dtype=dtype)
    options = {"divergence": name, "grad_scale": 2.0**14}
    _, exact = fk.gaussian_divergence_value_and_grad(pred.double(), target.double(), **options, backend="torch")
    _, single = fk.gaussian_divergence_value_and_grad(pred.float(), target.float(), **options, backend="torch")
    eager_error = (single.to(dtype).double() - exact).abs()
    leaf = pred.clone().requires_grad_()
    loss = fk.gaussian_divergence(leaf, target, name, backend="cpu")
    (by_autograd,) = torch.autograd.grad(loss * options["grad_scale"], leaf)
    _, grad = fk.gaussian_divergence_value_and_grad(pred, target, **options, backend="cpu")
    for found in (grad, by_autograd):
        error = (found.double() - exact).abs()
        assert error.max() <= eager_error.max()
        # One rounding less or more out of a thousand falls the other way.
        assert error.square().mean() <= eager_error.square().mean() * 1.001


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_critic_gradients_are_no_worse_than_eager_ones_rounded_once(
    instruction_set: str, dtype: torch.dtype
) -> None:
    v, _ = pair(16384, dtype=dtype)
    for name in CRITICS:
        for samples_from in ("q", "p"):
            options = {"divergence": name, "samples_from": samples_from, "reduction": "sum", "grad_scale": 64.0}
            _, exact = fk.density_ratio_divergence_value_and_grad(v.double(), **options, backend="torch")
            _, single = fk.density_ratio_divergence_value_and_grad(v.float(), **options, backend="torch")
            _, grad = fk.density_ratio_divergence_value_and_grad(v, **options, backend="cpu")
            error, eager = ((found.double() - exact).abs() for found in (grad, single.to(dtype)))
            assert error.max() <= eager.max() * (1 + 1e-4), name
            assert error.square().mean() <= eager.square().mean() * 1.001, name


@on_every_set("instruction_set, dtype, scale", pairs(SETS, NARROW, [1.0, 0.7, 3e-4, 1e-7, 77.0, 4e4, -1.3]))
def test_every_number_is_rounded_to_the_nearest(instruction_set: str, dtype: torch.dtype, scale: float) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    zeros = torch.zeros_like(every)
    _, grad = fk.gaussian_divergence_value_and_grad(
        every, zeros, "kl", reduction="none", grad_scale=scale, backend="cpu"
    )
    expected = (every.float() * scale).to(dtype)
    # NaN is compared as such, not by its bits.
    assert torch.equal(grad.isnan(), expected.isnan())
    assert torch.equal(grad.nan_to_num(nan=0).view(torch.int16), expected.nan_to_num(nan=0).view(torch.int16))


@on_every_set("instruction_set, size, dtype", pairs(SETS, SIZES, DTYPES))
def test_sizes(instruction_set: str, size: int, dtype: torch.dtype) -> None:
    pred, target = pair(2, size, dtype=dtype)
    mask = torch.rand(size, generator=torch.Generator().manual_seed(1))
    name = "squared_hellinger"
    torch.set_num_threads(2 if 2 * size >= 32_000 else 1)  # fewer elements are not shared out
    check_gaussian("cpu", pred, target, name, distance="sum", sigma=math.sqrt(size), grad_scale=64.0 * size)
    check_gaussian("cpu", pred, target, name, mask=mask, reduction="sum", grad_scale=float(size))
    check_variational("cpu", pred, target, "jensen_shannon", reduction="sum", grad_scale=16.0)
    check_variational("cpu", pred[0], target, "le_cam", mask=mask, grad_scale=16.0 * size)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 63, 64, 65, 4095, 4096, 4097, 8191, 8193, 12289, 65535, 65536])
def test_batches(batch: int) -> None:
    pred, target = pair(batch, 3)
    sigma, weight = 0.5 + torch.rand(batch), torch.rand(batch)
    torch.set_num_threads(2)
    for reduction in REDUCTIONS:
        check_gaussian("cpu", pred, target, sigma=sigma, weight=weight, reduction=reduction, grad_scale=float(batch))
        check_density_ratio("cpu", pred, "kl", weight=weight, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_past_the_caches(instruction_set: str, dtype: torch.dtype) -> None:
    # More than 12 MiB, in rows that begin at no multiple of a vector.
    size = 13 * 2**20 // (3 * torch.finfo(dtype).bits // 8) | 1
    pred, target = pair(3, size, dtype=dtype)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    torch.set_num_threads(2)
    for layout in ("dense", "offset"):
        buffer = laid_out(torch.full_like(pred, math.nan), layout)
        _, grad = fk.gaussian_divergence_value_and_grad(
            pred, target, "mse", distance="sum", reduction="sum", grad_scale=0.5, grad_out=buffer, backend="cpu"
        )
        assert torch.equal(grad, pred - target)
        _, grad = fk.gaussian_divergence_value_and_grad(
            pred, target.to(other), "mse", distance="sum", reduction="sum", grad_scale=0.5, grad_out=buffer,
            backend="cpu",
        )  # fmt: skip
        assert torch.equal(grad, (pred - target.to(other)).to(dtype))


@on_every_set("instruction_set, layout, dtype", pairs(SETS, ["permuted", "sliced", "offset"], [*NARROW, torch.float32]))
def test_layouts_of_every_operand(instruction_set: str, layout: str, dtype: torch.dtype) -> None:
    pred, target = pair(3, 5, 17, 19, dtype=dtype)
    mask = torch.rand(3, 1, 17, 19, generator=torch.Generator().manual_seed(1))
    mask[1] = 0
    for moved in range(5):
        operands = [pred, target, mask, torch.full_like(pred, math.nan)]
        for index in range(4):
            if moved in (index, 4):
                operands[index] = laid_out(operands[index], layout)
        a, b, m, buffer = operands
        _, grad = check_gaussian("cpu", a, b, mask=m, grad_scale=2.0**10, grad_out=buffer)
        assert bool((grad[1] == 0).all())
        check_variational("cpu", a, b, "jensen_shannon", mask=m, grad_scale=2.0**10)
        check_variational("cpu", a, b, "jensen_shannon", mask=m, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_keeps_the_layout_of_its_input(dtype: torch.dtype) -> None:
    pred, target = pair(2, 3, 4, 5, dtype=dtype)
    for a in (pred.to(memory_format=torch.channels_last), laid_out(pred, "permuted")):
        _, grad = check_gaussian("cpu", a, target)
        assert grad.stride() == a.stride()
        assert fk.density_ratio_divergence_value_and_grad(a, backend="cpu")[1].stride() == a.stride()


def test_expanded_operands() -> None:
    pred, target = pair(4, 3, 6, 5)
    mask = torch.rand(6, 5)
    for a, b in (
        (pred, target[:1].expand(4, 3, 6, 5)),
        (pred, target[:, :, :1, :1].expand(4, 3, 6, 5)),
        (pred, torch.zeros(()).expand(4, 3, 6, 5)),
        (pred[:, :1].expand(4, 3, 6, 5), target),
        (torch.ones(()).expand(4, 3, 6, 5), target[..., :1].expand(4, 3, 6, 5)),
    ):
        check_gaussian("cpu", a, b, mask=mask.expand(4, 3, 6, 5))
        check_variational("cpu", a, b, "kl", mask=mask.expand(3, 6, 5))
    for one in (torch.tensor(0.5), torch.tensor([0.5])):
        check_gaussian("cpu", pred, target, sigma=one.expand(4), weight=one.expand(4))
        check_density_ratio("cpu", pred, "kl", weight=one.expand(4))
    check_gaussian("cpu", pred, target, sigma=torch.linspace(1, 2, 8)[::2], weight=torch.linspace(0, 1, 8)[1::2])


def negative(tensor: Tensor) -> Tensor:
    """The same values behind a negative bit, as the imaginary part of a conjugate has them."""
    view = torch.complex(tensor, -tensor).conj().imag
    assert view.is_neg() and torch.equal(view, tensor)
    return view


def test_negative_bits() -> None:
    pred, target = pair(3, 4, 5)
    positive = [torch.rand(3) + 0.5, torch.rand(3), torch.rand(3, 4, 5)]
    for moved in range(5):
        a, b, sigma, weight, mask = (
            negative(tensor) if index == moved else tensor for index, tensor in enumerate((pred, target, *positive))
        )
        check_gaussian("cpu", a, b, sigma=sigma, weight=weight, mask=mask)
        check_variational("cpu", a, b, "kl", mask=mask)
        check_density_ratio("cpu", a, "kl", weight=weight)


def test_negative_bits_of_what_comes_back() -> None:
    pred, target = pair(3, 4, 5)
    for reduction in REDUCTIONS:
        leaf = pred.clone().requires_grad_()
        for loss in (
            fk.gaussian_divergence(leaf, target, reduction=reduction, backend="cpu"),
            fk.variational_model_loss(leaf, "kl", reduction=reduction, backend="cpu"),
        ):
            upstream = torch.rand_like(loss)
            (expected,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
            assert torch.equal(torch.autograd.grad(loss, leaf, negative(upstream))[0], expected)
    plain, scaled = (
        fk.gaussian_divergence_value_and_grad(pred, target, grad_scale=scale, backend="cpu")[1]
        for scale in (torch.tensor(2.0), negative(torch.tensor(2.0)))
    )
    assert torch.equal(plain, scaled)


MASKS = [(2, 3, 4, 5), (2, 1, 4, 5), (1, 3, 4, 5), (4, 5), (3, 1, 5), (1, 1), (5,), (2, 3, 1, 1), (2, 1, 1, 1), ()]


@pytest.mark.parametrize("shape, of_mask, dtype", pairs(MASKS, [torch.bool, *DTYPES], DTYPES), ids=str)
def test_masks_of_every_form(shape: tuple[int, ...], of_mask: torch.dtype, dtype: torch.dtype) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    mask = mask > 0.4 if of_mask == torch.bool else mask.to(of_mask)
    if len(shape) == 4 and shape[0] == 2:
        mask[0] = 0
    pred, target = pair(2, 3, 4, 5, dtype=dtype)
    for distance in ("mean", "sum"):
        check_gaussian("cpu", pred, target, mask=mask, distance=distance, reduction="none")
    for reduction in REDUCTIONS:
        check_variational("cpu", pred, target, "jensen_shannon", mask=mask, reduction=reduction)


@pytest.mark.parametrize("name", fk.divergences())
def test_an_empty_mask_row_gives_zero(name: str) -> None:
    pred, target = pair(3, 2, 40)
    mask = torch.ones(3, 1, 40, dtype=torch.bool)
    mask[1] = False
    for distance in ("mean", "sum"):
        value, grad = check_gaussian(
            "cpu", pred, target, name, mask=mask, distance=distance, reduction="none", sigma=5.0
        )
        assert value[1] == 0 and value[0] > 0 and bool((grad[1] == 0).all())
    nothing = torch.zeros(3, 2, 40)
    if name != "mse":
        found = fk.variational_divergence_value_and_grad(pred, target, name, mask=nothing, backend="cpu")
        assert all(bool((part == 0).all()) for part in found)


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sigma_and_weight_of_any_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    pred, target = pair(6, 50, dtype=dtype)
    sigma, weight = torch.linspace(0.5, 3, 6).to(other), torch.linspace(0, 2, 6).to(other)
    check_gaussian("cpu", pred, target, sigma=sigma, weight=weight)
    check_gaussian("cpu", pred, target, sigma=sigma[2], weight=weight)
    check_density_ratio("cpu", pred, "kl", "p", weight=weight)


@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (3, 0, 5), (3, 5, 0), (2, 0, 3, 0)])
def test_samples_without_elements(shape: tuple[int, ...]) -> None:
    pred, target = pair(*shape)
    for reduction in REDUCTIONS:
        # The last one has no memory, and strides of 0.
        for mask in (
            None,
            torch.ones(shape[-1:], dtype=torch.bool),
            torch.ones(shape).as_strided(shape, [0] * len(shape)),
        ):
            check_gaussian("cpu", pred, target, mask=mask, reduction=reduction)
            check_variational("cpu", pred, target, "kl", mask=mask, reduction=reduction)
        check_density_ratio("cpu", pred, "kl", weight=torch.ones(shape[0]), reduction=reduction)


def test_one_number_and_many_dimensions() -> None:
    p, q = pair()
    check_variational("cpu", p, q, "kl", mask=torch.tensor(0.5))
    pred, target = pair(2, *[2, 1] * 4, 3)
    check_gaussian("cpu", laid_out(pred, "sliced"), laid_out(target, "permuted"), mask=torch.rand(2, 1, 2, 1, 3))
    many = torch.ones([1] * 65)
    with pytest.raises((ValueError, RuntimeError), match="dimensions"):
        fk.gaussian_divergence(many, many, backend="cpu")


BEYOND = {"pearson_chi2": 64.0, "neyman_chi2": 64.0, "alpha:3": 64 / 3, "alpha:-2": 64 / 3, "alpha:12": 64 / 66}


@on_every_set("instruction_set, name, dtype", pairs(SETS, list(BEYOND), [torch.float32, torch.float64, torch.bfloat16]))
def test_the_straight_line_beyond_the_largest_exponent(instruction_set: str, name: str, dtype: torch.dtype) -> None:
    end = BEYOND[name]
    divergence = fk.get_divergence(name)
    assert divergence.exponential is not None
    c, k = divergence.exponential
    assert k * end == pytest.approx(64)
    sigma = (
        torch.tensor([end * 0.99, end * 1.001, end * 1.5, 2 * end, 100 * end, 1e4 * end, 1e8 * end]).double().rsqrt()
    )
    s = sigma.square().reciprocal()
    pred = torch.ones(len(s), dtype=dtype)
    value, grad = fk.gaussian_divergence_value_and_grad(
        pred, torch.zeros_like(pred), name, sigma=sigma, reduction="none", backend="cpu"
    )
    inside = s.clamp(max=end)
    slope = c * torch.exp(k * inside)
    expected = c * torch.expm1(k * inside) / k + slope * (s - inside)
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    # sigma is rounded to float64, and exp multiplies that by 64.
    relative = 64 * unit(accumulation)
    assert bool(value.isfinite().all()) and bool(grad.isfinite().all())
    assert_within(value, expected, relative * expected)
    rounding = 0.0 if dtype == accumulation else torch.finfo(dtype).eps / 2
    assert_within(grad, 2 * s * slope, (relative + rounding) * 2 * s * slope)
    assert bool((value.diff() > 0).all())


@on_every_set(
    "instruction_set, name, dtype", pairs(SETS, [*fk.divergences(), "alpha:3", "alpha:0.001", "alpha:-1"], DTYPES)
)
def test_extremes(instruction_set: str, name: str, dtype: torch.dtype) -> None:
    numbers = [0.0, -0.0, 1e-40, 1e-30, 1e-20, 1e-8, 1e-3, 1.0, 7.9, 8.1, 30.0, 1e4, 1e10, 1e18, 3e19, 3e38, math.inf]
    pred = torch.tensor([*numbers, math.nan], dtype=torch.float64).to(dtype)
    pred = torch.cat([pred, -pred])
    target = torch.zeros_like(pred)
    value, grad = check_gaussian("cpu", pred, target, name, reduction="none")
    nan = pred.isnan()
    assert (
        torch.equal(value.isnan(), nan) and bool((value[pred == 0] == 0).all()) and bool((grad[pred == 0] == 0).all())
    )
    assert bool(grad[nan].isnan().all()) and not bool(grad[pred.isfinite()].isnan().any())
    check_gaussian("cpu", pred, target, name, reduction="none", sigma=1e-10)
    check_gaussian("cpu", target, pred, name, reduction="none", sigma=1e10)
    if name != "mse":
        for parametrization in ("log_ratio", "fgan"):
            check_variational("cpu", pred, -pred, name, reduction="none", parametrization=parametrization)
        for samples_from in ("q", "p"):
            check_density_ratio("cpu", pred, name, samples_from, reduction="none")


@pytest.mark.parametrize("w", [1e-6, 1e-3, 0.3, 0.999, 1 - 1e-6])
def test_a_skew_softplus_does_not_cancel(instruction_set: str, w: float) -> None:
    v = torch.linspace(-40, 40, 4001)
    check_variational("cpu", v, v, f"skew_jensen_shannon:{w}", reduction="none")
    # Far below log((1 - w)/w) the terms are about w (e^v - 1).
    v = torch.linspace(-2, 2, 401)
    value = fk.variational_model_loss(v, f"skew_jensen_shannon:{w}", reduction="none", backend="cpu")
    wide = v.double()
    exact = -(1 - w) * torch.log1p(w * torch.expm1(wide))
    assert_within(value, exact, 1e-6 * exact.abs() + 1e-38)


@pytest.mark.parametrize("size", [7, 1025, 40_001])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_sample(size: int, number: float) -> None:
    pred, target = pair(3, size)
    clean = fk.gaussian_divergence_value_and_grad(pred, target, reduction="none", backend="cpu")
    clean_v = fk.variational_divergence_value_and_grad(pred, target, "kl", reduction="none", backend="cpu")
    mask = torch.ones(3, size, dtype=torch.bool)
    mask[1, size // 2] = False
    for where in (pred, target):
        was = where[1, size // 2].item()
        where[1, size // 2] = number
        value, grad = check_gaussian("cpu", pred, target, reduction="none")
        for found, before in ((value, clean[0]), (grad, clean[1])):
            assert torch.equal(found[[0, 2]], before[[0, 2]])
        # Also where the mask is 0: a NaN is never hidden.
        value, grad = check_gaussian("cpu", pred, target, reduction="none", mask=mask)
        assert value.isnan().tolist() == [False, True, False] and bool(grad[1].isnan().all())
        if where is pred and math.isnan(number):
            found = fk.variational_divergence_value_and_grad(pred, target, "kl", reduction="none", backend="cpu")
            for after, before in zip(found[:2], clean_v[:2], strict=True):
                assert after.isnan().sum() == 1 and torch.equal(after[[0, 2]], before[[0, 2]])
        where[1, size // 2] = was


@pytest.mark.parametrize("given", ["sigma", "weight", "mask"])
def test_a_nan_in_the_other_arguments(given: str) -> None:
    pred, target = pair(3, 4)
    numbers = torch.ones(3, 4) if given == "mask" else torch.ones(3)
    numbers[1] = math.nan
    value, grad = check_gaussian("cpu", pred, target, reduction="none", **{given: numbers})
    assert value.isnan().tolist() == [False, True, False] and bool(grad[1].isnan().all())


def calls(pred: Tensor, target: Tensor, mask: Tensor | None) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Everything that the kernels do, on one pair of tensors."""
    divergence = fk.get_divergence("jensen_shannon")
    profile, (a, _), ratio = (
        divergence.gaussian_profile,
        divergence.critic_functions("log_ratio"),
        divergence.ratio_function("p"),
    )
    weight = torch.linspace(0.5, 1, len(pred))
    both = {"mask": mask, "backend": "cpu"}
    return {
        "mean": lambda: fk.gaussian_divergence_value_and_grad(pred, target, "jensen_shannon", weight=weight, **both),
        "none": lambda: fk.gaussian_divergence_value_and_grad(pred, target, "kl", reduction="none", **both),
        "backward": lambda: (
            cpu.gaussian_backward(GaussianCall(pred, target, profile, mask=mask), weight.to(torch.float32)),
        ),
        "critic": lambda: fk.variational_divergence_value_and_grad(pred, target, **both),
        "ratio": lambda: cpu.expectation_value_and_grad(ExpectationCall(pred, ratio, weight)),
        "back": lambda: (cpu.expectation_backward(ExpectationCall(pred, a, None, mask, "sum"), torch.tensor(0.3)),),
    }


@on_every_set(
    "instruction_set, shape, dtype",
    pairs(SETS, [(1, 200_001), (3, 70_001), (7, 3, 64, 65), (5000, 17), (2, 40_000)], DTYPES),
)
def test_the_same_bits_for_any_number_of_threads_and_on_every_run(
    instruction_set: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    pred, target = pair(*shape, dtype=dtype)
    mask = torch.rand(shape[-1], generator=torch.Generator().manual_seed(1))
    for m in (None, mask):
        for name, call in calls(laid_out(pred, "permuted") if len(shape) > 2 else pred, target, m).items():
            expected = call()
            for threads in (2, 3, 5, 1):
                torch.set_num_threads(threads)
                for _ in range(2):
                    for one, other in zip(call(), expected, strict=True):
                        assert torch.equal(one, other), (name, threads)


def test_instruction_sets_agree_within_rounding() -> None:
    pred, target = pair(3, 3001)
    module = build.load()
    before = module.instruction_set()
    results = []
    for name in SETS:
        module.use_instruction_set(name)
        results.append([part for call in calls(pred, target, None).values() for part in call()])
    module.use_instruction_set(before)
    for parts in zip(*results, strict=True):
        for part in parts[1:]:
            torch.testing.assert_close(part, parts[0], rtol=4e-6, atol=1e-9)


def sparse(path: Path, count: int, dtype: torch.dtype) -> Tensor:
    """A tensor over a file of that many elements, of which only what is written takes up space."""
    try:
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no sparse files of {count} elements here: {error}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_offsets_past_two_to_the_31(instruction_set: str, tmp_path: Path, dtype: torch.dtype) -> None:
    # Strides in elements beyond 2^31 and offsets in bytes beyond 2^32, in the batch and inside a sample.
    strides = (2**32 + 2**20, 2**31 + 9, 1)
    count = 2 * strides[0] + 2 * strides[1] + 1100
    shape = (3, 3, 1100)  # chunks begin in every row
    operands = []
    for index, tensor in enumerate((*pair(*shape, dtype=dtype), torch.full(shape, math.nan, dtype=dtype))):
        far = sparse(tmp_path / str(index), count, dtype).as_strided(shape, strides)
        operands.append(far.copy_(tensor))
    mask = sparse(tmp_path / "mask", count, torch.bool).as_strided(shape, strides)
    mask.copy_(torch.rand(shape) > 0.3)
    pred, target, grad = operands
    check_gaussian("cpu", pred, target, mask=mask, grad_out=grad, grad_scale=64.0)
    check_variational("cpu", pred, target, "jensen_shannon", mask=mask, grad_scale=64.0)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    # Without the memory: pred[0, i, j] = x_i and target[0, i, j] = y_j.
    rows, columns = 2**16 + 3, 2**15 + 5
    x, y = pair(rows)[0], pair(columns, seed=1)[0]
    pred, target = x[:, None].expand(1, rows, columns), y.expand(1, rows, columns)
    torch.set_num_threads(2)
    value = fk.gaussian_divergence(pred, target, "mse", backend="cpu")
    wide_x, wide_y = x.double(), y.double()
    expected = wide_x.square().mean() - 2 * wide_x.mean() * wide_y.mean() + wide_y.square().mean()
    assert value.item() == pytest.approx(expected.item(), rel=2e-6)
    bound = fk.variational_model_loss(pred.to(torch.bfloat16), "reverse_kl", backend="cpu")
    assert bound.item() == pytest.approx(1 - x.to(torch.bfloat16).double().mean().item(), rel=2e-6)
