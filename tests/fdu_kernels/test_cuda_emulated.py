"""The logic of the CUDA kernels without a GPU, by their emulation on the host."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Any

import emulated_cuda
import pytest
import torch
from emulated_cuda import EmulatedKernels, registered
from kernel_testing import check_density_ratio, check_gaussian, check_variational, laid_out, pair, pairs
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels import build
from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.kernels.native import CudaBackend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MACHINES = {"small": (3, False), "Ampere": (108, False), "Hopper": (132, True)}
"""Multiprocessors, clusters."""
CRITICS = [name for name in fk.divergences() if name != "mse"]

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.quick(
        machine=["Hopper"], dtype=[torch.bfloat16], of_pred=[torch.bfloat16, "dense"], mask_dtype=[torch.bool]
    ),
]


@pytest.fixture(scope="module")
def module() -> types.ModuleType:
    try:
        return emulated_cuda.load()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kernels(module: types.ModuleType) -> Iterator[EmulatedKernels]:
    """Registered as the backend "emulated"."""
    made = EmulatedKernels(module)
    with registered("emulated", made):
        yield made


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest, kernels: EmulatedKernels) -> Iterator[None]:
    """Hopper, unless a test names others; afterwards all tickets are zeros again."""
    kernels._compiled.machine(*MACHINES[getattr(request, "param", "Hopper")], False, False)
    kernels.copies = 0
    yield
    assert not kernels.tickets.any()


each_machine = pytest.mark.parametrize("machine", MACHINES, indirect=True)


def value_and_grad(kernels: CudaBackend, pred: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    name, grad_out = options.pop("name", "jensen_shannon"), options.pop("grad_out", None)
    call = GaussianCall(pred, target, fk.get_divergence(name).gaussian_profile, **options)
    return kernels.gaussian_value_and_grad(call, grad_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", fk.divergences())
def test_every_divergence(name: str, dtype: torch.dtype) -> None:
    pred, target = pair(5, 3, 7, 11, dtype=dtype)
    check_gaussian("emulated", pred, target, name, grad_scale=256.0)
    if name != "mse":
        check_variational("emulated", 3 * pred, 3 * target, name, grad_scale=256.0)
        for samples_from in ("q", "p"):
            check_density_ratio("emulated", 3 * pred, name, samples_from, grad_scale=256.0)


# Around vectors, warps, elements a thread (8 ... 64), blocks of 512 threads, parts of a cluster, steps of a walk.
SIZES = [1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2049, 4096, 4097]
LARGE = [8193, 16385, 32768, 32769, 65537, 262144, 262145]


@pytest.mark.parametrize(
    "machine, size, dtype",
    pairs(list(MACHINES), [*SIZES, *LARGE], [torch.float32, torch.bfloat16]), indirect=["machine"], ids=str,
)  # fmt: skip
def test_sizes(kernels: EmulatedKernels, size: int, dtype: torch.dtype) -> None:
    for batch in (1, 3) if size <= 10_000 else (2,):
        pred, target = pair(batch, size, dtype=dtype)
        mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) > 0.3
        check_gaussian("emulated", pred, target, "squared_hellinger")
        if size <= 70_000:
            check_gaussian("emulated", pred, target, "jensen_shannon", mask=mask, reduction="sum")


@pytest.mark.parametrize("of_target", DTYPES, ids=str)
@pytest.mark.parametrize("of_pred", DTYPES, ids=str)
def test_every_pair_of_dtypes(kernels: EmulatedKernels, of_pred: torch.dtype, of_target: torch.dtype) -> None:
    for shape in ((3, 1), (3, 5), (2, 511), (3, 512), (1, 513), (2, 2050), (1, 8191), (2, 16385), (1, 131_073)):
        pred, target = pair(*shape)
        pred, target = pred.to(of_pred), target.to(of_target)
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        kernels.copies = 0
        check_gaussian("emulated", pred, target, "squared_hellinger", grad_scale=64.0)
        for number, of_mask in enumerate((torch.bool, torch.float16, torch.float32)):
            if number == 0 or shape[1] < 3000:
                check_gaussian("emulated", pred, target, "jensen_shannon", mask=(mask + 0.3).to(of_mask))
        assert kernels.copies == 0
        if shape[1] < 3000:
            check_gaussian("emulated", pred, target, "jensen_shannon", mask=mask.double())
            assert kernels.copies == 4  # of each call: float64 is not read


@pytest.mark.quick(machine=["Hopper"], size=[1, 5, 129, 513, 8193])
@each_machine
@pytest.mark.parametrize("size", [1, 3, 4, 5, 127, 129, 512, 513, 8193, 16_384, 16_388, 65_540])
def test_sizes_of_two_dtypes(kernels: EmulatedKernels, size: int) -> None:
    for batch in (1, 3) if size <= 10_000 else (2,):
        pred, target = pair(batch, size)
        mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) > 0.3
        check_gaussian("emulated", pred.bfloat16(), target)
        check_gaussian("emulated", pred, target.half(), "jensen_shannon", mask=mask, reduction="sum")
        # One mask for several samples: its groups and theirs are side by side where samples are whole groups.
        assert kernels.copies == 0 or (batch > 1 and size % 4)


@each_machine
@pytest.mark.parametrize("shape", [(1100, 3), (300, 40), (20, 1100)], ids=str)
def test_batches(shape: tuple[int, ...]) -> None:
    pred, target = pair(*shape)
    for reduction in ("none", "mean", "sum"):
        check_gaussian("emulated", pred, target, "jensen_shannon", reduction=reduction)


MASKS = [(3, 1, 8, 12), (8, 12), (3, 4, 8, 12), (12,), (3, 1, 1, 1), (4, 1, 12)]


# With a size of 1 a sample is one block, with 4 several.
@pytest.mark.parametrize(
    "mask_shape, mask_dtype, size", pairs(MASKS, [torch.bool, *DTYPES, torch.float64], [1, 4]), ids=str
)
def test_masks(mask_shape: tuple[int, ...], mask_dtype: torch.dtype, size: int) -> None:
    shape = tuple(side * size if i >= len(mask_shape) - 2 and side > 4 else side for i, side in enumerate(mask_shape))
    pred, target = pair(3, 4, 8 * size, 12 * size, dtype=torch.bfloat16 if size == 1 else torch.float32)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator)
    mask = mask > 0.4 if mask_dtype == torch.bool else mask.to(mask_dtype)
    if len(shape) == 4:
        mask[1] = 0
    for layout in (torch.contiguous_format, torch.channels_last):
        one, other = (tensor.contiguous(memory_format=layout) for tensor in (pred, target))
        distance = "mean" if layout == torch.channels_last else "sum"
        check_gaussian("emulated", one, other, "squared_hellinger", mask=mask, distance=distance, sigma=30.0)


LAYOUTS = ["dense", "permuted", "sliced", "offset"]


@pytest.mark.parametrize("of_target", LAYOUTS)
@pytest.mark.parametrize("of_pred", LAYOUTS)
def test_layouts(of_pred: str, of_target: str) -> None:
    for shape in ((3, 5, 4, 8), (2, 3, 20, 44)):
        pred, target = pair(*shape, dtype=torch.bfloat16)
        pred, target = laid_out(pred, of_pred), laid_out(target, of_target)
        mask = laid_out((torch.rand(shape[2:], generator=torch.Generator().manual_seed(1)) > 0.4).float(), of_target)
        check_gaussian("emulated", pred, target, "jensen_shannon")
        check_gaussian("emulated", pred, target, "jensen_shannon", mask=mask)
        check_variational("emulated", pred, target, "le_cam", mask=mask)
        check_density_ratio("emulated", pred, "kl", "q", laid_out(torch.rand(shape[0]), of_target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [3, 64, 1001, 40_001])
@pytest.mark.parametrize("shift", [1, 3])
def test_equal_shifts_are_read_as_vectors(module: types.ModuleType, shift: int, size: int, dtype: torch.dtype) -> None:
    pred, target = (
        torch.zeros(2 * size + 16, dtype=dtype)[shift : shift + 2 * size].view(2, size).copy_(tensor)
        for tensor in pair(2, size, dtype=dtype)
    )
    buffer = torch.full((2 * size + 16,), math.nan, dtype=dtype)
    out = buffer[shift : shift + 2 * size].view(2, size)
    _, before, _ = module.counts()
    check_gaussian("emulated", pred, target, "jensen_shannon", grad_out=out)
    assert buffer[:shift].isnan().all() and buffer[shift + 2 * size :].isnan().all()
    _, after, _ = module.counts()
    assert after > before or size == 3
    check_gaussian("emulated", pred, target, "jensen_shannon", mask=torch.rand(size), grad_out=out)


def shifted(tensor: Tensor, shift: int) -> Tensor:
    """The same values, from the element of that number on in a buffer of NaN."""
    buffer = torch.full((tensor.numel() + 16,), math.nan).to(tensor.dtype)
    return buffer[shift : shift + tensor.numel()].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize(
    "shift, size, dtypes",
    pairs([1, 3, 4, 6], [2, 3, 64, 1001, 40_001], [(0, 1), (1, 0), (2, 1), (1, 1)]), ids=str,
)  # fmt: skip
def test_equal_shifts_of_several_dtypes_are_read_in_groups(
    kernels: EmulatedKernels, shift: int, size: int, dtypes: tuple[int, int]
) -> None:
    of_pred, of_target = dtypes
    pred, target = pair(2, size)
    pred = shifted(pred.to(DTYPES[of_pred]), shift)
    # A multiple of 4 elements apart is as good.
    target = shifted(target.to(DTYPES[of_target]), shift % 4 + 4 * (of_pred != of_target))
    out = shifted(torch.full_like(pred, math.nan), shift)
    for mask in (None, torch.rand(2, size), torch.rand(2, size) > 0.3, torch.rand(2, 1)):
        given = mask if mask is None or mask.shape[1] == 1 else shifted(mask, shift)
        check_gaussian("emulated", pred, target, "jensen_shannon", grad_out=out, mask=given)
        buffer = out.as_strided((2 * size + 16,), (1,), 0)
        assert buffer[:shift].isnan().all() and buffer[shift + 2 * size :].isnan().all()
        copies = kernels.copies
        value_and_grad(kernels, pred, target, mask=given, grad_out=out)
        assert kernels.copies == copies


def strided(tensor: Tensor, layout: str) -> Tensor:
    if layout == "expanded":
        return tensor[:, :1].expand(tensor.shape)
    return shifted(tensor, 1) if layout == "shifted" else laid_out(tensor, layout)


@pytest.mark.parametrize("of_target", DTYPES, ids=str)
@pytest.mark.parametrize("of_pred", DTYPES, ids=str)
def test_what_does_not_fit_is_copied(kernels: EmulatedKernels, of_pred: torch.dtype, of_target: torch.dtype) -> None:
    for shape in ((3, 5, 7, 9), (2, 4, 24, 40)):
        pred, target = pair(*shape)
        given = pred.to(of_pred), target.to(of_target), torch.rand(shape) > 0.4, torch.full(shape, math.nan).to(of_pred)
        for moved in range(4):
            for layout in ("permuted", "sliced", "shifted", "expanded", "channels_last"):
                operands = list(given)
                if layout == "channels_last":
                    operands[moved] = operands[moved].contiguous(memory_format=torch.channels_last)
                elif layout != "expanded" or moved < 3:
                    operands[moved] = strided(operands[moved], layout)
                one, other, mask, out = operands
                kernels.copies = 0
                check_gaussian("emulated", one, other, mask=mask, grad_out=out, grad_scale=16.0)
                assert kernels.copies or layout == "expanded"
                check_gaussian("emulated", one, other, "jensen_shannon", grad_out=out, grad_scale=16.0)


def test_a_target_in_another_order_costs_one_copy(kernels: EmulatedKernels) -> None:
    pred, target = pair(2, 4, 24, 40)
    pred = pred.contiguous(memory_format=torch.channels_last)
    created: list[Tensor] = []
    create = torch.empty_like

    def record(*arguments: Any, **options: Any) -> Tensor:
        created.append(create(*arguments, **options))
        return created[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", record)
        _, grad = value_and_grad(kernels, pred, target)
    assert grad.stride() == pred.stride()
    assert [tensor.device.type for tensor in created] == ["cpu", "meta", "cpu"]  # gradient, order, target


@pytest.mark.parametrize("size", [1, 100, 16_384, 131_072, 131_080, 262_144, 524_296, 2**20, 2**20 + 8])
@pytest.mark.parametrize("mixed", [False, True])
def test_launches_and_traffic(module: types.ModuleType, kernels: EmulatedKernels, mixed: bool, size: int) -> None:
    """Value with its reduction and gradient: one launch where a sample fits on chip, everything in groups of four."""
    launches = 1 if size <= (131_072 if mixed else 2**20) else 2
    pred, target = pair(2, size)
    before = module.counts()
    value_and_grad(kernels, pred.bfloat16() if mixed else pred, target, name="squared_hellinger")
    launched, wide, narrow = (now - then for now, then in zip(module.counts(), before, strict=True))
    assert launched == launches
    least = (3 if launches == 1 else 5) * 2 * size // 4
    # Beyond the end of a sample its last vector is read again. Each thread of a gradient reads its coefficient.
    assert least - 6 <= wide <= least + 2 * 2 * 8 * 512 and (narrow <= 12 or launches == 2)


@each_machine
def test_launches_that_share_their_work_fill_the_device_once(
    request: pytest.FixtureRequest, module: types.ModuleType, kernels: EmulatedKernels
) -> None:
    resident = 3 * MACHINES[request.node.callspec.params["machine"]][0]
    pred, target = pair(1, 1_400_000)
    kernels.expectation_forward(ExpectationCall(pred, fk.get_divergence("kl").ratio_function("q")))
    assert module.blocks() == resident
    value_and_grad(kernels, pred, target)
    assert module.blocks() == min(resident, 1 + (1_400_000 - 1) // (256 * 4 * 4))


@each_machine
def test_any_order_of_blocks_gives_the_same_bits(
    request: pytest.FixtureRequest, module: types.ModuleType, kernels: EmulatedKernels
) -> None:
    count, clusters = MACHINES[request.node.callspec.params["machine"]]
    function = fk.get_divergence("kl").ratio_function("q")
    for shape in ((50, 700), (3, 9000), (1, 300_001)):
        pred, target = pair(*shape)
        results = []
        for backwards in (False, True):
            for capturing in (False, True):
                module.machine(count, clusters, capturing, backwards)
                found = (
                    *value_and_grad(kernels, pred, target),
                    kernels.expectation_forward(ExpectationCall(pred, function)),
                )
                results.append(found)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_graph_leaves_the_tickets_of_its_stream_alone(module: types.ModuleType, kernels: EmulatedKernels) -> None:
    module.machine(132, True, True, False)
    pred, target = pair(3, 9000)
    kernels.tickets.fill_(7)
    value, _ = value_and_grad(kernels, pred, target)
    assert (kernels.tickets == 7).all() and value.isfinite()
    kernels.tickets.zero_()


# What one block would hold, what needs a cluster, and what not even the largest one holds.
@pytest.mark.parametrize("room", [0, 2])
@pytest.mark.parametrize("size, launches", [(8192, 1), (65_536, 2), (524_288, 2)])
def test_a_device_without_room_for_clusters(
    module: types.ModuleType, kernels: EmulatedKernels, size: int, launches: int, room: int
) -> None:
    """As in a share of a GPU (MIG, MPS): there a launch of such a cluster fails."""
    pred, target = pair(1, size)
    whole = value_and_grad(kernels, pred, target)
    module.largest_cluster(room)
    before = module.counts()[0]
    found = value_and_grad(kernels, pred, target)
    assert module.counts()[0] - before == launches
    for one, other in zip(whole, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


IN_TURNS = [(32_768, 1), (33_000, 2), (65_536, 2), (65_544, 4), (262_144, 8)]
"""Elements of a sample, and blocks of its cluster."""


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("case, dtype", pairs(IN_TURNS, DTYPES), ids=str)
def test_clusters_take_samples_in_turns(
    module: types.ModuleType, kernels: EmulatedKernels, case: tuple[int, int], dtype: torch.dtype, backwards: bool
) -> None:
    """Where a batch has more samples than the device holds at once. Each is still read once."""
    (size, blocks), batch, clusters = case, 5, 2
    module.machine(clusters * blocks, True, False, backwards)
    pred, target = pair(batch, size, dtype=dtype)
    check_gaussian("emulated", pred, target, "jensen_shannon", weight=torch.linspace(0.5, 2, batch))
    before = module.counts()
    value_and_grad(kernels, pred, target)
    launched, wide, _ = (now - then for now, then in zip(module.counts(), before, strict=True))
    assert launched == 1 and module.blocks() == clusters * blocks
    assert wide == 3 * pred.nbytes // 16


@pytest.mark.parametrize("other, blocks", [("odd", 10), ("masked", 10), ("two dtypes", 20), ("no room", 15)])
def test_other_samples_are_not_taken_in_turns(
    module: types.ModuleType, kernels: EmulatedKernels, other: str, blocks: int
) -> None:
    module.machine(4, True, False, False)
    pred, target = pair(5, 40_000 + (other == "odd"))
    target = target.half() if other == "two dtypes" else target
    mask = torch.rand(pred.shape[1]) > 0.3 if other == "masked" else None
    if other == "no room":
        module.largest_cluster(0)
    check_gaussian("emulated", pred, target, mask=mask)
    value_and_grad(kernels, pred, target, mask=mask)
    assert module.blocks() == blocks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_sigma_weight_and_scale_in_any_dtype(dtype: torch.dtype) -> None:
    pred, target = pair(3, 50)
    sigma, weight = (torch.tensor(numbers, dtype=dtype) for numbers in ([0.5, 1.0, 2.0], [1.0, 0.0, 3.0]))
    for each in (sigma, sigma[1], 0.7):
        scale = torch.tensor(3.0, dtype=dtype)
        check_gaussian("emulated", pred, target, sigma=each, weight=weight, grad_scale=scale, reduction="sum")
    strided = torch.stack([sigma, sigma]).T.reshape(-1)[::2]
    check_gaussian("emulated", pred, target, sigma=strided, weight=laid_out(weight, "sliced"))


@pytest.mark.parametrize("name", ["squared_hellinger", "pearson_chi2", "jensen_shannon", "total_variation"])
@pytest.mark.parametrize("size", [1, 1000, 20_000])
def test_extremes(name: str, size: int) -> None:
    for number in (0.0, 1e-20, 1e4, 3e19, math.inf, math.nan):
        pred, target = torch.zeros(2, size), torch.zeros(2, size)
        pred[1, size // 2] = number
        check_gaussian("emulated", pred, target, name, distance="sum", reduction="none")
        mask = torch.ones(2, size, dtype=torch.bool)
        mask[1] = False
        check_gaussian("emulated", pred, target, name, mask=mask, reduction="none")


@pytest.mark.parametrize("name", CRITICS)
def test_extreme_density_ratios(name: str) -> None:
    v = torch.tensor(
        [0.0, -0.0, 1e-30, 1.0, -1.0, 20.0, -20.0, 63.0, -63.0, 90.0, -90.0, 1e4, -1e4, math.inf, -math.inf]
    )
    v = torch.cat([v, torch.tensor([math.nan])])
    for samples_from in ("q", "p"):
        check_density_ratio("emulated", v, name, samples_from, reduction="none")
    check_variational("emulated", v, v.flip(0), name, reduction="none")


@pytest.mark.parametrize("name", [*CRITICS, "alpha:3", "skew_jensen_shannon:1e-6", "hockey_stick:0.01"])
def test_approximations_of_the_hardware_keep_the_error_rule(name: str) -> None:
    size = torch.cat([torch.logspace(-30, 1, 3001), torch.linspace(0.2, 3.0, 3000), torch.linspace(3.0, 86.0, 3000)])
    v = torch.cat([size, -size])
    for samples_from in ("q", "p"):
        check_density_ratio("emulated", v, name, samples_from, reduction="none")
    for parametrization in ("log_ratio", "fgan"):
        check_variational("emulated", v, v.flip(0), name, parametrization=parametrization, reduction="none")


@pytest.mark.parametrize(
    "shape, reduction, dtype",
    pairs([(1,), (7,), (3, 5), (2, 8, 16), (3, 6007), (20_000,)], ["none", "mean", "sum"], DTYPES), ids=str,
)  # fmt: skip
def test_density_ratios(shape: tuple[int, ...], reduction: str, dtype: torch.dtype) -> None:
    p, q = pair(*shape, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    weight, mask = torch.rand(shape[0], generator=generator), torch.rand(shape, generator=generator) > 0.5
    check_density_ratio("emulated", p, "jensen_shannon", "q", weight, reduction)
    for one in (None, mask, mask[0], mask.new_zeros(())):
        check_variational("emulated", p, q, "kl", one, reduction=reduction, grad_scale=0.5)


def test_samples_without_elements() -> None:
    empty = torch.zeros(3, 0)
    for reduction in ("none", "mean", "sum"):
        results = []
        for backend in ("emulated", "torch"):
            found = fk.gaussian_divergence_value_and_grad(empty, empty, reduction=reduction, backend=backend)
            bound = fk.variational_divergence_value_and_grad(empty, empty, "kl", reduction=reduction, backend=backend)
            results.append((*found, *bound))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, equal_nan=True)


def test_many_dimensions() -> None:
    shape = (2, *[2, 3] * 6)
    pred, target = pair(*shape)
    order = [0, *torch.randperm(12, generator=torch.Generator().manual_seed(2)).add(1).tolist()]
    mask = torch.rand(shape[-5:]) > 0.5
    for one in (pred, pred.permute(order)):
        other = target.reshape(one.shape)
        fitting = mask if one is pred else None
        check_gaussian("emulated", one, other, "jensen_shannon", mask=fitting)
        check_variational("emulated", one, other, "kl", fitting, reduction="none")


def test_offsets_past_two_to_the_31() -> None:
    far = 2**31 + 24
    try:
        memory = [torch.empty(far + 600, dtype=torch.float16) for _ in range(3)]  # touched in a few places only
    except RuntimeError:
        pytest.skip("not enough address space")
    pred, target, out = (one.as_strided((2, 600), (far, 1)) for one in memory)
    for one, values in zip((pred, target), pair(2, 600, dtype=torch.float16), strict=True):
        one.copy_(values)
    check_gaussian("emulated", pred, target, "jensen_shannon", grad_out=out)
    odd = [one.as_strided((2, 3, 200), (200, far // 3, 1)) for one in (pred, target)]
    odd[0].copy_(odd[1] + 1)
    check_gaussian("emulated", *odd, "kl")


def test_division_by_multiplication(module: types.ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    divisors = [1, 2, 3, 5, 7, 12, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**31 + 1, 2**40 - 3, 2**62]
    numbers = torch.randint(2**62, (200,), generator=generator).tolist()
    numbers += [number % 2**34 for number in numbers] + [0, 1, 2**31 - 1, 2**31, 2**62, 2**63 - 1]
    for by in divisors:
        for number in (by - 1, by, by + 1, *numbers):
            assert module.divide(number, by) == number // by


@pytest.mark.parametrize("count, clusters", MACHINES.values(), ids=MACHINES)
def test_plans(module: types.ModuleType, count: int, clusters: bool) -> None:
    for vector, mixed in ((4, False), (8, False), (4, True)):
        of_warp, most = (32, 32) if mixed else (16, 64)
        for size in (*SIZES, *LARGE, 2**19, 2**19 + 8, 2**20, 2**20 + 8):
            whole = not mixed and size % vector == 0
            for batch in (1, 2, 7, 64, 132, 1000, 65536):
                elements, warps, parts = module.on_chip(size, batch, mixed, vector, count, clusters)
                if elements == 0:
                    assert size > most * 512 * ((32 if whole else 8) if clusters else 1)
                    continue
                if elements > most:
                    assert clusters and whole and elements == 128 and warps == 16
                    assert parts == (8 if size <= 2**19 else 16)
                else:
                    assert elements in ((32,) if mixed else (8, 16, 32, 64)) and warps <= 16
                    assert parts in ((1, 2, 4, 8) if clusters else (1,))
                assert warps > 1 or (parts == 1 and elements <= of_warp)
                assert elements * 32 * warps * parts >= size
                shared, blocks = module.walk(size, batch, vector, 4 * count)
                assert shared in (1, 8) and 1 <= blocks <= 1024 and (blocks == 1 or (shared == 8 and batch < 1024))
                assert blocks == 1 or batch * blocks <= 2048
