"""Autograd, torch.compile and the rest of PyTorch around the fused backends, on every one that can run here."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import fdu_kernels as fk
from fdu_kernels import torch_ops
from fdu_kernels.calls import ExpectationCall, GaussianCall

NAMES = ["mse", "squared_hellinger", "pearson_chi2", "jensen_shannon", "total_variation"]
CUSTOM = fk.Divergence.from_generator(lambda u: (u - 1).square() / 2, "half_chi2")


def runnable() -> list[str]:
    return [name for name, reason in fk.backends().items() if reason is None and name != "torch"]


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"


@pytest.fixture(params=runnable() or [pytest.param("", marks=pytest.mark.skip(reason="no fused backend can run here"))])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def pair(backend: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred, target = (torch.randn(shape, generator=generator).to(device_of(backend), dtype) for _ in range(2))
    return pred, target


def losses(backend: str, **options: object) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """One loss of two tensors for each of the three forms."""
    return {
        "gaussian": lambda a, b: fk.gaussian_divergence(a, b, "squared_hellinger", backend=backend, **options),
        "tabulated": lambda a, b: fk.gaussian_divergence(a, b, "jensen_shannon", backend=backend, **options),
        "variational": lambda a, b: fk.variational_divergence(a, b, "le_cam", backend=backend, **options),
        "model": lambda a, b: fk.variational_model_loss(a, "kl", backend=backend, **options) + 0 * b.sum(),
        "ratio": lambda a, b: fk.density_ratio_divergence(a, "jensen_shannon", "p", backend=backend, **options),
    }


FORMS = list(losses(""))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_derivatives(backend: str, form: str, reduction: str) -> None:
    if backend != "cpu":
        pytest.skip(f"{backend} has no float64")
    a, b = pair(backend, 2, 3, 2, dtype=torch.float64)
    a.requires_grad_()
    b.requires_grad_(form == "variational")
    loss = losses(backend, reduction=reduction)[form]
    assert gradcheck(loss, (a, b))
    assert gradgradcheck(loss, (a, b))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("form", FORMS)
def test_any_upstream_gradient_any_number_of_times(backend: str, form: str, reduction: str) -> None:
    a, b = pair(backend, 3, 4, 5)
    a.requires_grad_()
    ours, reference = (losses(name, reduction=reduction)[form] for name in (backend, "torch"))
    for scale in (1.0, -2.5, 0.0):
        value = ours(a, b)
        upstream = torch.full_like(value, scale)
        grads = [torch.autograd.grad(value, a, upstream, retain_graph=True)[0] for _ in range(3)]
        (expected,) = torch.autograd.grad(reference(a, b), a, upstream)
        for grad in grads:
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(grads[0], grads[1]) or scale == 1.0
    upstream = torch.full_like(upstream, math.nan)
    assert bool(torch.autograd.grad(ours(a, b), a, upstream)[0].isnan().all())


@pytest.mark.parametrize("form", FORMS)
def test_accumulation_into_leaves(backend: str, form: str) -> None:
    a, b = pair(backend, 3, 4, 5)
    a.requires_grad_()
    value = losses(backend)[form](a, b)
    value.backward(retain_graph=True)
    once = a.grad.clone()
    value.backward()
    torch.testing.assert_close(a.grad, 2 * once)
    # Nothing that autograd keeps may be what it handed out.
    value = losses(backend)[form](a, b)
    (grad,) = torch.autograd.grad(value, a, retain_graph=True)
    grad.fill_(math.nan)
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], once)


def test_changed_inputs_are_noticed(backend: str) -> None:
    pred, target = pair(backend, 3, 4)
    pred.requires_grad_()
    loss = fk.gaussian_divergence(pred * 1, target, backend=backend)
    target.add_(1)
    with pytest.raises(RuntimeError, match="modified.*inplace operation"):
        loss.backward()


def test_a_changed_sigma_is_noticed(backend: str) -> None:
    pred, target = pair(backend, 3, 4)
    sigma = torch.ones(3, device=pred.device)
    loss = fk.gaussian_divergence(pred.requires_grad_(), target, sigma=sigma, backend=backend)
    sigma.mul_(2)
    with pytest.raises(RuntimeError, match="modified.*inplace operation"):
        (loss / 3).backward()


def test_no_graph_without_a_need(backend: str) -> None:
    a, b = pair(backend, 3, 4)
    for loss in losses(backend).values():
        assert not loss(a, b).requires_grad
        with torch.no_grad():
            assert not loss(a.clone().requires_grad_(), b).requires_grad
        with torch.inference_mode():
            assert loss(a, b).isfinite()


@pytest.mark.quick(name=["squared_hellinger", "jensen_shannon"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "custom"])
def test_compiled_without_a_break_and_for_any_shape(backend: str, name: str, masked: bool) -> None:
    divergence = CUSTOM if name == "custom" else name
    torch._dynamo.reset()

    def step(pred: Tensor, target: Tensor, mask: Tensor | None, sigma: Tensor) -> tuple[Tensor, Tensor]:
        loss = fk.gaussian_divergence(pred * 2, target, divergence, sigma=sigma, mask=mask, backend=backend)
        return loss, fk.gaussian_divergence_value_and_grad(pred, target, divergence, 0.5, backend=backend)[1]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 3, 4), (5, 7, 2)):
        pred, target = pair(backend, *shape)
        mask = target > 0 if masked else None
        sigma = torch.linspace(0.5, 2, shape[0], device=pred.device)
        pred.requires_grad_()
        results = []
        for function in (step, compiled):
            loss, grad = function(pred, target, mask, sigma)
            results.append([loss.detach(), grad, *torch.autograd.grad(loss, pred)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", ["variational", "model", "ratio"])
def test_compiled_density_ratios(backend: str, form: str) -> None:
    torch._dynamo.reset()
    function = losses(backend)[form]
    a, b = pair(backend, 4, 5)
    a.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(a, b), a)
    value = compiled(a, b)
    torch.testing.assert_close(value, function(a, b))
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], expected)


def test_compiled_value_and_grad_of_density_ratios(backend: str) -> None:
    torch._dynamo.reset()

    def both(p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        bound = fk.variational_divergence_value_and_grad(p, q, "kl", grad_scale=0.5, backend=backend)
        return *bound, *fk.density_ratio_divergence_value_and_grad(p, "kl", backend=backend)

    p, q = pair(backend, 4, 5)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(p, q), both(p, q), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_ops_keep_the_rules_of_torch_library(backend: str) -> None:
    pred, target = pair(backend, 3, 4, 5)
    pred.requires_grad_()
    mask, weight = target > 0, torch.ones(3, device=pred.device)
    one = torch.ones((), device=pred.device)
    for name, reduction, sigma in (("alpha:0.3", "mean", 0.5), ("jensen_shannon", "none", weight)):
        profile = fk.get_divergence(name).gaussian_profile
        for values in (pred, pred.detach()):
            call = GaussianCall(values, target.bfloat16(), profile, sigma, weight, mask, "mean", reduction)
            call.return_distance = values is pred
            opcheck(torch_ops.gaussian_forward, (*call.flat(), backend))
        call.grad_scale = one
        for call.return_distance in (False, True):
            opcheck(torch_ops.gaussian_value_and_grad, (*call.flat(), backend))
        opcheck(torch_ops.gaussian_backward, (*call.flat(), backend, torch.ones(3, device=pred.device)))
    function = fk.get_divergence("kl").ratio_function("q")
    opcheck(torch_ops.expectation_forward, (*ExpectationCall(pred, function, weight).flat(), backend))
    for v in (pred.detach(), pred.detach().permute(2, 0, 1)):
        for call in (ExpectationCall(v, function), ExpectationCall(v, function, reduction="none", grad_scale=2.0)):
            upstream = one if call.reduction == "mean" else torch.ones_like(v)
            opcheck(torch_ops.expectation_forward, (*call.flat(), backend))
            opcheck(torch_ops.expectation_backward, (*call.flat(), backend, upstream))
            opcheck(torch_ops.expectation_value_and_grad, (*call.flat(), backend))
    numbers = torch.tensor([0.5, -0.1, 0.0, 0.7, 2.0], dtype=torch.float64)
    flat = GaussianCall(pred.detach(), target, fk.get_divergence("kl").gaussian_profile).flat()
    opcheck(torch_ops.gaussian_value_and_grad, (*flat[:2], [], numbers, *flat[4:], backend))


@pytest.mark.parametrize("name, reduction", [("alpha:0.3", "mean"), ("jensen_shannon", "none"), ("kl", "sum")])
def test_the_distance_comes_with_the_loss(backend: str, name: str, reduction: str) -> None:
    """The same bits as without it, by every way; s is a constant."""
    pred, target = pair(backend, 4, 3, 5)
    mask, sigma = target > 0, torch.tensor([0.5, 1.0, 2.0, 3.0], device=pred.device)
    mask[1] = False
    options = {"sigma": sigma, "weight": sigma, "mask": mask, "reduction": reduction, "backend": backend}
    leaf = pred.requires_grad_()

    def ways(pred: Tensor, target: Tensor, **asked: bool) -> list[tuple[Tensor, ...]]:
        loss = fk.gaussian_divergence(pred * 2, target, name, **options, **asked)
        # AOTAutograd would take a loss without a graph for the same as the one with it.
        alone = fk.gaussian_divergence(pred.detach() * 3, target, name, **options, **asked)
        both = fk.gaussian_divergence_value_and_grad(pred * 2, target, name, **options, **asked)
        return [found if isinstance(found, tuple) else (found,) for found in (loss, alone, both)]

    truths = [
        fk.squared_distance(factor * pred.detach().double(), target.double(), sigma.double(), mask)
        for factor in (2, 3, 2)
    ]
    plain = ways(pred, target)
    (wanted,) = torch.autograd.grad(plain[0][0].sum(), leaf)
    compiled = torch.compile(ways, fullgraph=True, dynamic=True, backend="aot_eager")
    torch._dynamo.reset()
    for way in (ways, compiled):
        found = way(pred, target, return_distance=True)
        for (*before, s), expected, truth in zip(found, plain, truths, strict=True):
            assert s.dtype == torch.float64 and not s.requires_grad and s[1] == 0
            torch.testing.assert_close(s, truth, rtol=2e-6, atol=0)
            for one, other in zip(before, expected, strict=True):
                assert torch.equal(one, other) if way is ways else torch.allclose(one, other)
        (grad,) = torch.autograd.grad(found[0][0].sum(), leaf)
        torch.testing.assert_close(grad, wanted, rtol=0 if way is ways else 1e-6, atol=0)


def test_the_distance_under_transforms(backend: str) -> None:
    pred, target = pair(backend, 2, 4, 5)

    def loss(pred: Tensor) -> tuple[Tensor, Tensor]:
        return fk.gaussian_divergence(pred[None], target[:1], sigma=0.5, backend=backend, return_distance=True)

    def both(pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        call = fk.gaussian_divergence_value_and_grad
        return call(pred[None], target[:1], sigma=0.5, backend=backend, return_distance=True)

    truth = fk.squared_distance(pred, target[:1].expand_as(pred), 0.5)
    grads, s = torch.func.vmap(torch.func.grad(loss, has_aux=True))(pred)
    torch.testing.assert_close(s[:, 0].float(), truth)
    *_, s = torch.func.vmap(both)(pred)
    torch.testing.assert_close(s[:, 0].float(), truth)
    # A constant: nothing flows through it.
    assert not bool(torch.func.grad(lambda pred: loss(pred)[1].sum())(pred[0]).any()) and bool(grads.any())


def test_autocast_leaves_the_losses_alone(backend: str) -> None:
    a, b = pair(backend, 3, 4)
    for form, loss in losses(backend).items():
        with torch.autocast(device_of(backend), dtype=torch.bfloat16):
            inside = loss(a, b)
        assert inside.dtype == torch.float32, form
        assert torch.equal(inside, loss(a, b))


def test_a_model_under_autocast_needs_no_casts(backend: str) -> None:
    device = device_of(backend)
    model, (x, target), results = nn.Linear(4, 4).to(device), pair(backend, 8, 4), []
    for loss in (
        lambda pred: fk.gaussian_divergence(pred, target, "mse", backend=backend),
        lambda pred: nn.functional.mse_loss(pred, target),
    ):
        with torch.autocast(device, dtype=torch.bfloat16):
            pred = model(x)
            value = loss(pred)
        assert pred.dtype == torch.bfloat16 and value.dtype == torch.float32
        results.append([value.detach(), *torch.autograd.grad(value, model.weight)])
    torch.testing.assert_close(*results, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("dtypes", itertools.permutations((torch.float16, torch.bfloat16, torch.float32), 2), ids=str)
def test_two_dtypes_are_promoted_without_a_copy(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    wide, wide_target = pair(backend, 3, 4, 5)
    pred, target = wide.to(dtypes[0]), wide_target.to(dtypes[1])
    value, grad = fk.gaussian_divergence_value_and_grad(pred, target, "le_cam", backend=backend)
    exact = fk.gaussian_divergence_value_and_grad(pred.double(), target.double(), "le_cam", backend="torch")
    assert value.dtype == nn.functional.mse_loss(pred.float(), target.float()).dtype and grad.dtype == pred.dtype
    torch.testing.assert_close(value.double(), exact[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact[1], rtol=torch.finfo(pred.dtype).eps, atol=1e-7)
    leaf = pred.requires_grad_()
    (found,) = torch.autograd.grad(fk.gaussian_divergence(leaf, target, "le_cam", backend=backend), leaf)
    torch.testing.assert_close(found, grad, rtol=torch.finfo(pred.dtype).eps, atol=1e-7)


def test_float64_on_one_side_makes_the_value_float64() -> None:
    pred, target = pair("cpu", 3, 4)
    for backend in ["torch", *(name for name in runnable() if name == "cpu")]:
        value, grad = fk.gaussian_divergence_value_and_grad(pred, target.double(), backend=backend)
        exact = fk.gaussian_divergence_value_and_grad(pred.double(), target.double(), backend="torch")
        assert value.dtype == torch.float64 and grad.dtype == torch.float32
        torch.testing.assert_close(value, exact[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, exact[1].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_scaling_reaches_the_gradient_before_it_is_rounded(backend: str, dtype: torch.dtype) -> None:
    pred, target = pair(backend, 2, 50_000, dtype=dtype)
    pred.requires_grad_()
    scale = 2.0**16
    loss = fk.gaussian_divergence(pred, target, "squared_hellinger", sigma=3.0, backend=backend)
    (grad,) = torch.autograd.grad(loss * scale, pred)
    wide, wide_target = pred.detach().double(), target.double()
    expected = fk.gaussian_divergence_value_and_grad(
        wide, wide_target, "squared_hellinger", sigma=3.0, backend="torch", grad_scale=scale
    )[1]
    torch.testing.assert_close(grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=2.0**-24)


def test_gradient_scaler(backend: str) -> None:
    device = device_of(backend)
    model = nn.Linear(4, 4).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device)
    x, target = pair(backend, 8, 4)
    before = fk.gaussian_divergence(model(x), target, backend=backend).item()
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(fk.gaussian_divergence(model(x), target, backend=backend)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert fk.gaussian_divergence(model(x), target, backend=backend).item() < before


def test_distributed_data_parallel(backend: str) -> None:
    plain = nn.Linear(4, 4).to(device_of(backend))
    alone = copy.deepcopy(plain)
    x, target = pair(backend, 8, 4)

    def step(model: nn.Module) -> None:
        fk.gaussian_divergence(model(x), target, "jensen_shannon", backend=backend).backward()

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        # The wrapper goes before the group does: where it was the group's last user, its end sometimes hung.
        step(nn.parallel.DistributedDataParallel(plain))
        gc.collect()
    finally:
        torch.distributed.destroy_process_group()
    step(alone)
    torch.testing.assert_close(plain.weight.grad, alone.weight.grad)


def test_threads_do_not_disturb_each_other(backend: str) -> None:
    if backend == "triton" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter serves one thread")
    pred, target = pair(backend, 4, 1000)
    expected = fk.gaussian_divergence_value_and_grad(pred, target, "jensen_shannon", backend=backend)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            value, grad = fk.gaussian_divergence_value_and_grad(pred, target, "jensen_shannon", backend=backend)
            if not (torch.equal(value, expected[0]) and torch.equal(grad, expected[1])):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_users_generator_is_a_gaussian_loss_but_no_critic(backend: str) -> None:
    pred, target = pair(backend, 3, 4)
    ours = fk.gaussian_divergence(pred, target, CUSTOM, backend=backend)
    exact = 0.5 * fk.gaussian_divergence(pred, target, "pearson_chi2", backend="torch")
    torch.testing.assert_close(ours, exact)
    with pytest.raises(RuntimeError, match=f"backend asks for '{backend}'.*generator of your own is Python code"):
        fk.variational_model_loss(pred, CUSTOM, backend=backend)
    assert fk.variational_model_loss(pred, CUSTOM).isfinite()


def test_tensor_subclasses_go_through_the_ops(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        pred = torch.empty(3, 4, device=device_of(backend), requires_grad=True)
        target = torch.empty(3, 4, device=device_of(backend))
        loss = fk.gaussian_divergence(pred, target, backend=backend)
        assert loss.shape == ()
        (grad,) = torch.autograd.grad(loss, pred)
        assert grad.shape == pred.shape


def test_a_meta_tensor_gives_a_meta_loss(backend: str) -> None:
    pred = torch.empty(3, 4, device="meta", requires_grad=True)
    for name in NAMES:
        loss = fk.gaussian_divergence(pred, torch.empty(3, 4, device="meta"), name)
        assert loss.is_meta and torch.autograd.grad(loss, pred)[0].is_meta


def test_traced_graphs_hold_the_losses(backend: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for loss in losses(backend).values():
        a, b = pair(backend, 3, 4)
        graph = make_fx(loss)(a, b)
        # Other inputs than those it was traced with: nothing of them was taken for a constant.
        torch.testing.assert_close(graph(b, 2 * a), loss(b, 2 * a))


def test_traced_graphs_hold_transformed_losses(backend: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for loss in losses(backend).values():
        a, b = pair(backend, 3, 4)
        for transformed in (torch.func.grad(loss), torch.func.vmap(loss)):
            given = (a, b) if transformed(a, b).shape == a.shape else (a[:, None], b[:, None])
            graph = make_fx(transformed)(*given)
            others = given[1], 2 * given[0]
            torch.testing.assert_close(graph(*others), transformed(*others))


def test_jit_trace_is_refused_with_a_remedy(backend: str) -> None:
    with pytest.raises(RuntimeError, match="torch.jit.trace cannot record.*use torch.export"):
        torch.jit.trace(lambda a, b: fk.gaussian_divergence(a, b, backend=backend), pair(backend, 3, 4))


def test_writing_a_gradient_counts_as_a_change(backend: str) -> None:
    a, b = (x.detach() for x in pair(backend, 3, 4))
    out, leaf = torch.zeros_like(a), torch.ones_like(a, requires_grad=True)
    product = (leaf * out).sum()
    fk.gaussian_divergence_value_and_grad(a, b, backend=backend, grad_out=out)
    with pytest.raises(RuntimeError, match="modified.*inplace operation"):
        product.backward()


def test_compiled_weights_and_masks_are_constants(backend: str) -> None:
    a, b = (x.detach() for x in pair(backend, 3, 4))
    weight, mask = torch.rand(3, device=a.device), torch.rand(3, 4, device=a.device)

    def both(weight: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        first = fk.gaussian_divergence_value_and_grad(a, b, "kl", weight=weight, mask=mask, backend=backend)
        return *first, *fk.density_ratio_divergence_value_and_grad(a, "kl", weight=weight, backend=backend)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    found = compiled(weight.clone().requires_grad_(), mask.clone().requires_grad_())
    assert not any(one.requires_grad for one in found)
    torch.testing.assert_close(found, both(weight, mask))


MEMORY = """
import torch
import fdu_kernels as fk

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def extra(call):
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # reset the high-water mark
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before

torch.set_num_threads(2)
a, b = torch.randn(16, 16, 128, 128), torch.randn(16, 16, 128, 128)
leaf = a.clone().requires_grad_()
calls = {
    "gaussian": lambda: fk.gaussian_divergence_value_and_grad(a, b, "jensen_shannon", backend="cpu"),
    "autograd": lambda: torch.autograd.grad(fk.gaussian_divergence(leaf, b, backend="cpu"), leaf),
    "scaled": lambda: torch.autograd.grad(3 * fk.gaussian_divergence(leaf, b, backend="cpu"), leaf),
    "ratio": lambda: fk.density_ratio_divergence_value_and_grad(a, "kl", backend="cpu"),
}
for call in calls.values():
    call()
for name, call in calls.items():
    print(name, extra(call) - 4 * a.numel())
"""


@pytest.mark.skipif("cpu" not in runnable(), reason="no compiled backend")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_the_gradient() -> None:
    ran = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=200)
    beyond = {name: int(value) for name, value in (line.split() for line in ran.stdout.splitlines())}
    assert set(beyond) == {"gaussian", "autograd", "scaled", "ratio"}
    assert all(value < 2**20 for value in beyond.values()), beyond
