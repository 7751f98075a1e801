"""The fused backends on an NVIDIA GPU: golden values, precision, sizes past 2^31, graphs, streams, memory, no waiting.

Only torch, triton, numpy and pytest are needed. Without a GPU every test is skipped by name, but in a rehearsal.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu_testing import ARCHITECTURE, DEVICE, REHEARSAL, anywhere, on_a_gpu
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels import build, registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["mse", "squared_hellinger", "alpha:0.3", "jensen_shannon", "total_variation"]
CRITICS = ["kl", "jeffreys", "jensen_shannon", "le_cam", "squared_hellinger", "pearson_chi2"]
SHAPES = [(1,), (5,), (3, 7), (2, 4, 64, 64), (7, 4, 33, 35), (65_536, 3), (2, 1_000_003), (1, 4_194_304)]
SHAPES = SHAPES[: 5 if REHEARSAL else None]
Row = tuple[str, Tensor, Tensor, Tensor]
FUSED = ("triton", "cuda")
VECTORS = Path(__file__).parents[1] / "fdu_kernels" / "vectors"

pytestmark = anywhere


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``gaussian_row`` is (spelling, s, h, h'), ``variational_row`` (spelling, v, A, B, A', B')."""
    for name in ("gaussian", "variational"):
        if f"{name}_row" in metafunc.fixturenames:
            rows = json.loads((VECTORS / f"{name}.json").read_text())["divergences"]
            values = [(key, *torch.tensor(rows[key], dtype=torch.float64).T) for key in rows]
            metafunc.parametrize(f"{name}_row", values, ids=list(rows))


@pytest.fixture(scope="session")
def emulated() -> Iterator[None]:
    """In a rehearsal the backend "cuda" is emulated, and fails where a machine with a GPU could not build it."""
    from emulated_cuda import EmulatedKernels, load, registered

    plan = build.recipe((ARCHITECTURE,))
    if not plan.architectures:
        raise build.BuildError(plan.cuda)
    build.built(plan)
    with registered("cuda", EmulatedKernels(load())):
        yield


@pytest.fixture(params=FUSED)
def backend(request: pytest.FixtureRequest) -> str:
    """Each fused backend; one that cannot run on a machine with a GPU is a failure, not a skip."""
    if REHEARSAL and request.param == "cuda":
        request.getfixturevalue("emulated")
    reason = registry.backend_named(request.param).why_unavailable()
    assert reason is None, f"{request.param} cannot run here: {reason}"
    return request.param


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    pred, target = (torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for _ in range(2))
    return pred, target


def truth(pred: Tensor, target: Tensor, name: str, **options: object) -> tuple[Tensor, ...]:
    return fk.gaussian_divergence_value_and_grad(pred.double(), target.double(), name, **options, backend="torch")


def test_golden_values(backend: str, gaussian_row: Row) -> None:
    name, s, h, slope = gaussian_row
    # In float32 s is the square of a rounded number: that is the s of which h is asked.
    pred = s.sqrt().float().to(DEVICE)
    exact = pred.double().square().cpu()
    divergence = fk.get_divergence(name)
    h, slope = divergence.profile(exact), divergence.profile_grad(exact)
    value, grad = fk.gaussian_divergence_value_and_grad(
        pred, torch.zeros_like(pred), name, reduction="none", backend=backend
    )
    k = abs(divergence.exponential[1]) if divergence.exponential else 1.0
    bound = 2e-6 * (k * exact).clamp(min=1)
    normal = h.abs() > 1e-37
    assert bool((((value.cpu().double() - h) / h).abs()[normal] <= bound[normal]).all())
    expected = 2 * pred.double().cpu() * slope
    normal = (expected.abs() > 1e-37) & (expected.abs() < 3e38)
    assert bool((((grad.cpu().double() - expected) / expected).abs()[normal] <= bound[normal]).all())


def test_golden_critics(backend: str, variational_row: tuple[str, Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
    name, v, *_ = variational_row
    v = v.float()
    for parametrization in ("log_ratio",):
        wide = v.double()
        wanted = fk.variational_divergence_value_and_grad(
            wide, wide, name, parametrization=parametrization, reduction="none", backend="torch"
        )
        eager = fk.variational_divergence_value_and_grad(v, v, name, reduction="none", backend="torch")
        found = fk.variational_divergence_value_and_grad(
            v.to(DEVICE), v.to(DEVICE), name, reduction="none", backend=backend
        )
        for ours, plain, true in zip(found[1:], eager[1:], wanted[1:], strict=True):
            finite = true.isfinite() & (true.abs() > 1e-37) & (true.abs() < 3e38)
            error = ((ours.cpu().double() - true) / true).abs()[finite]
            allowed = ((plain.double() - true) / true).abs()[finite].clamp(min=2e-6)
            assert bool((error <= 2 * allowed).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(backend: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pred, target = pair(shape, dtype)
    buffer = torch.full_like(pred, math.nan)
    value, grad, s = fk.gaussian_divergence_value_and_grad(
        pred, target, name, backend=backend, grad_out=buffer, return_distance=True
    )
    true_value, true_grad = truth(pred, target, name)
    true_s = fk.squared_distance(pred.double(), target.double())
    torch.testing.assert_close(s, true_s, rtol=4e-6, atol=0)
    torch.testing.assert_close(value.double(), true_value, rtol=4e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=max(torch.finfo(dtype).eps, 5e-6), atol=1e-7)
    leaf = pred.clone().requires_grad_()
    loss, s = fk.gaussian_divergence(leaf, target, name, backend=backend, return_distance=True)
    torch.testing.assert_close(s, true_s, rtol=4e-6, atol=0)
    torch.testing.assert_close(loss.double(), true_value, rtol=4e-6, atol=0)
    (by_autograd,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(by_autograd.double(), true_grad, rtol=max(torch.finfo(dtype).eps, 5e-6), atol=1e-7)


@pytest.mark.parametrize("layout", ["channels_last", "mixed", "sliced", "transposed"])
@pytest.mark.parametrize("mask_shape", [None, (3, 1, 17, 19), (17, 19), (3, 5, 17, 19)], ids=str)
def test_strides_and_masks(backend: str, mask_shape: tuple[int, ...] | None, layout: str) -> None:
    pred, target = pair((3, 5, 17, 19))
    if layout in ("channels_last", "mixed"):
        pred = pred.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        target = target.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        pred = torch.randn(3, 5, 17, 40, device=DEVICE)[..., 1:39:2]
    if layout == "transposed":
        pred = torch.randn(3, 5, 19, 17, device=DEVICE).mT
    mask = None if mask_shape is None else torch.rand(mask_shape, device=DEVICE)
    if mask is not None and mask_shape is not None and len(mask_shape) == 4:
        mask[1] = 0
    sigma, weight = torch.tensor([0.5, 1.0, 2.0], device=DEVICE), torch.tensor([1.0, 2.0, 0.5], device=DEVICE)
    options = {"sigma": sigma, "weight": weight, "mask": mask, "reduction": "none"}
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, backend=backend, **options)
    wide = {**options, "sigma": sigma.double(), "weight": weight.double()}
    true_value, true_grad = truth(pred, target, "squared_hellinger", **wide)
    assert grad.stride() == torch.empty_like(pred).stride()
    torch.testing.assert_close(value.double(), true_value, rtol=4e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=5e-6, atol=1e-9)


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 1_001), (64, 1, 64, 64)], ids=str)
def test_density_ratios(backend: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    p, q = pair(shape, dtype)
    found = fk.variational_divergence_value_and_grad(p, q, name, backend=backend)
    true = fk.variational_divergence_value_and_grad(p.double(), q.double(), name, backend="torch")
    for ours, exact in zip(found, true, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)
    for samples_from in ("q", "p"):
        found = fk.density_ratio_divergence_value_and_grad(p, name, samples_from, backend=backend)
        true = fk.density_ratio_divergence_value_and_grad(p.double(), name, samples_from, backend="torch")
        for ours, exact in zip(found, true, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)


# One block per sample, clusters, and several blocks per sample that count who comes last, all small enough for
# compute-sanitizer.
@pytest.mark.parametrize("size", [17_000, 40_001, 262_144, 300_001])
def test_clusters_and_tickets(backend: str, size: int) -> None:
    pred, target = pair((2, size))
    mask = target > -1
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, "le_cam", mask=mask, backend=backend)
    true_value, true_grad = truth(pred, target, "le_cam", mask=mask)
    torch.testing.assert_close(value.double(), true_value, rtol=4e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=5e-6, atol=1e-9)
    bound, true_bound = (
        fk.variational_divergence(*given, "le_cam", backend=name)
        for given, name in (((pred, target), backend), ((pred.double(), target.double()), "torch"))
    )
    torch.testing.assert_close(bound.double(), true_bound, rtol=1e-5, atol=1e-6)


# Clusters that take one sample after another, of which a batch has more than a GPU holds at once; the largest samples.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, size", [(300, 32_768), (150, 40_000), (40, 262_144), (3, 300_008), (2, 1_000_000)])
def test_shared_memory(backend: str, batch: int, size: int, dtype: torch.dtype) -> None:
    if REHEARSAL:
        batch, size = min(batch, 4), size if backend == "cuda" else size // 64  # interpreting takes long
    pred, target = pair((batch, size), dtype)
    weight = torch.linspace(0.5, 2, len(pred), device=DEVICE)
    given = {"weight": weight, "grad_scale": 64.0, "reduction": "sum", "return_distance": True}
    first = fk.gaussian_divergence_value_and_grad(pred, target, "jensen_shannon", backend=backend, **given)
    again = fk.gaussian_divergence_value_and_grad(pred, target, "jensen_shannon", backend=backend, **given)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    true = truth(pred, target, "jensen_shannon", **{**given, "weight": weight.double()})
    for ours, exact, bound in zip(first, true, (4e-6, max(torch.finfo(dtype).eps, 5e-6), 4e-6), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=bound, atol=1e-9)


@pytest.mark.parametrize("shape", [(64, 4, 64, 64), (3, 8_195 if REHEARSAL else 1_000_003)], ids=str)
def test_the_same_to_the_last_bit_on_every_run(backend: str, shape: tuple[int, ...]) -> None:
    pred, target = pair(shape)
    first = fk.gaussian_divergence_value_and_grad(pred, target, "jensen_shannon", backend=backend)
    for _ in range(2 if REHEARSAL else 20):
        again = fk.gaussian_divergence_value_and_grad(pred, target, "jensen_shannon", backend=backend)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@on_a_gpu
def test_nothing_waits_for_the_device(backend: str) -> None:
    pred, target = pair((4, 4, 64, 64))
    pred.requires_grad_()
    sigma, scale = torch.ones(4, device=DEVICE), torch.tensor(3.0, device=DEVICE)
    mask = target > 0

    def work() -> None:
        for name in ("squared_hellinger", "jensen_shannon"):
            fk.gaussian_divergence(pred, target, name, sigma=sigma, mask=mask, backend=backend).backward()
            fk.gaussian_divergence_value_and_grad(pred, target, name, grad_scale=scale, backend=backend)
            fk.variational_divergence(pred, target, name, backend=backend).backward()
            fk.density_ratio_divergence(pred, name, backend=backend).backward()

    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
def test_a_captured_graph_replays_on_new_values(backend: str) -> None:
    pred, target = pair((4, 4, 64, 64))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fk.gaussian_divergence_value_and_grad(pred, target, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = fk.gaussian_divergence_value_and_grad(pred, target, backend=backend)
    for factor in (0.5, 2.0):
        pred.mul_(factor)
        graph.replay()
        expected = fk.gaussian_divergence_value_and_grad(pred, target, backend=backend)
        assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


@on_a_gpu
def test_a_first_use_can_be_captured_after_a_warm_up(backend: str) -> None:
    """Of a divergence that nobody else has, whose table the graph still reads when the divergence is gone."""
    pred, target = pair((3, 4, 64, 64))
    own = fk.Divergence.from_generator(lambda u: (u - 1).square() / (u + 2))
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="warm_up"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fk.gaussian_divergence_value_and_grad(pred, target, own, backend=backend)
    fk.warm_up(pred, target, own, backend=backend)
    expected = fk.gaussian_divergence_value_and_grad(pred, target, own, backend=backend)
    with torch.cuda.graph(graph):
        value, grad = fk.gaussian_divergence_value_and_grad(pred, target, own, backend=backend)
    del own
    gc.collect()
    noise = [torch.full((1 << 16,), -1, dtype=torch.int32, device=DEVICE) for _ in range(64)]
    graph.replay()
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])
    del noise


@on_a_gpu
def test_streams(backend: str) -> None:
    pred, target = pair((64, 4, 64, 64))
    expected = fk.gaussian_divergence_value_and_grad(pred, target, backend=backend)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            results.append(fk.gaussian_divergence_value_and_grad(pred, target, backend=backend))
    torch.cuda.synchronize()
    assert all(torch.equal(value, expected[0]) and torch.equal(grad, expected[1]) for value, grad in results)


@on_a_gpu
def test_compiled_by_inductor(backend: str) -> None:
    torch._dynamo.reset()
    pred, target = pair((4, 4, 64, 64))
    pred.requires_grad_()

    def step(pred: Tensor, target: Tensor) -> Tensor:
        return fk.gaussian_divergence(pred * 2, target, "squared_hellinger", backend=backend) * 3

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    loss = compiled(pred, target)
    (grad,) = torch.autograd.grad(loss, pred)
    (expected,) = torch.autograd.grad(step(pred, target), pred)
    torch.testing.assert_close(grad, expected)


@on_a_gpu
def test_reduce_overhead_keeps_nothing_in_the_pool_of_its_graphs(backend: str) -> None:
    """The first call of a process may be the warm-up of a graph, whose memory belongs to others afterwards."""
    torch._dynamo.reset()

    def step(pred: Tensor, target: Tensor) -> Tensor:
        loss = fk.gaussian_divergence(pred * 2, target, "squared_hellinger", backend=backend)
        return loss + fk.variational_divergence(pred, target, "jensen_shannon", backend=backend)

    compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
    # Large samples and many elements: several blocks count who comes last.
    for round_ in range(6):
        for shape in ((2, 1_000_003), (64, 4, 64, 64)):
            pred, target = pair(shape)
            pred = (pred * (1 + round_)).requires_grad_()
            torch.compiler.cudagraph_mark_step_begin()
            loss = compiled(pred, target)
            (grad,) = torch.autograd.grad(loss, pred)
            loss, grad = loss.detach().clone(), grad.clone()
            noise = [torch.full((1 << 20,), -1, dtype=torch.int32, device=DEVICE) for _ in range(4)]
            plain = step(pred, target)
            (expected,) = torch.autograd.grad(plain, pred)
            torch.testing.assert_close(loss, plain.detach())
            torch.testing.assert_close(grad, expected)
            del noise


@on_a_gpu
def test_peak_memory_is_the_gradient(backend: str) -> None:
    pred, target = pair((64, 16, 128, 128))
    fk.gaussian_divergence_value_and_grad(pred, target, backend=backend)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, grad = fk.gaussian_divergence_value_and_grad(pred, target, backend=backend)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= grad.numel() * grad.element_size() + 2**20


@on_a_gpu
def test_past_two_to_the_31(backend: str) -> None:
    count = 2**31 + 4096 * 3
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2 * count:
        pytest.skip(f"needs {4 * 2 * count / 2**30:.0f} GiB of GPU memory")
    pred = torch.zeros(1, count, dtype=torch.bfloat16, device=DEVICE)
    target = torch.zeros_like(pred)
    pred[0, -1] = 4.0
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, "mse", distance="sum", backend=backend)
    assert value.item() == 16.0
    assert grad[0, -1].item() == 8.0 and grad[0, :-1].count_nonzero().item() == 0
    assert fk.density_ratio_divergence(pred, "kl", backend=backend).isfinite()


def test_extremes(backend: str) -> None:
    big = torch.tensor([[0.0], [1e-20], [1e4], [3e19], [math.inf], [math.nan]], device=DEVICE)
    for name in fk.divergences():
        value, grad = fk.gaussian_divergence_value_and_grad(
            big, torch.zeros_like(big), name, reduction="none", backend=backend
        )
        assert value[-1].isnan() and grad[-1].isnan(), name
        assert value[:3].isfinite().all() and grad[:3].isfinite().all(), name
        assert value[0] == 0, name
