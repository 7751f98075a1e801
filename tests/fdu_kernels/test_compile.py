"""torch.compile without a break, torch.export and packages of AOTInductor, for every loss, divergence and backend."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from kernel_testing import pairs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fdu_kernels as fk

OWN = fk.Divergence.from_generator(lambda u: (u - 1) ** 2 / (u + 3), "own")
ALL = [*map(fk.get_divergence, fk.divergences()), OWN]
BACKENDS = [name for name, reason in fk.backends().items() if reason is None]

pytestmark = pytest.mark.quick(backend=BACKENDS[:1], strict=[False])


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).requires_grad_(), torch.randn(shape, generator=generator)


def every_loss(divergence: fk.Divergence, backend: str) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Every loss of a divergence, and every value and gradient."""
    critic = "torch" if divergence is OWN else backend

    def each(a: Tensor, b: Tensor) -> list[Tensor]:
        weight = torch.ones(len(a), device=a.device)
        made = [fk.gaussian_divergence(2 * a, b, divergence, 0.7, weight, b[:1] > 0, backend=backend)]
        made += fk.gaussian_divergence_value_and_grad(a, b, divergence, backend=backend)
        if divergence.generator is None:
            return made
        made.append(fk.variational_divergence(2 * a, b, divergence, mask=b > 0, backend=critic))
        made.append(fk.variational_model_loss(a, divergence, parametrization="fgan", backend=critic))
        made.append(fk.density_ratio_divergence(a, divergence, reduction="none", backend=critic).sum())
        made += fk.variational_divergence_value_and_grad(a, b, divergence, backend=critic)
        return [*made, *fk.density_ratio_divergence_value_and_grad(a, divergence, "p", backend=critic)]

    return each


def check(compiled: Callable[..., list[Tensor]], eager: Callable[..., list[Tensor]], a: Tensor, b: Tensor) -> None:
    results = []
    for function in (compiled, eager):
        found = function(a, b)
        differentiable = [one for one in found if one.requires_grad]
        total = sum((i + 1) * one for i, one in enumerate(differentiable))
        results.append([len(differentiable), *torch.autograd.grad(total, a), *(one.detach() for one in found)])
    torch.testing.assert_close(*results, rtol=2e-5, atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_every_loss_compiles_without_a_break(divergence: fk.Divergence, backend: str) -> None:
    eager = every_loss(divergence, backend)
    check(torch.compile(eager, fullgraph=True, dynamic=False, backend="aot_eager"), eager, *tensors(3, 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name, backend", [*pairs(["kl", "le_cam", "own"], BACKENDS[:1]), ("le_cam", BACKENDS[-1])])
def test_any_shape_is_one_graph(name: str, backend: str) -> None:
    eager = every_loss(OWN if name == "own" else fk.get_divergence(name), backend)
    compiled = torch.compile(eager, fullgraph=True, dynamic=True, backend="aot_eager")
    check(compiled, eager, *tensors(3, 2, 4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(compiled, eager, *tensors(5, 3, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name, backend, dynamic", pairs(["alpha", "jensen_shannon"], BACKENDS, [False, True]))
def test_inductor(name: str, backend: str, dynamic: bool) -> None:
    eager = every_loss(fk.get_divergence(name), backend)
    compiled = torch.compile(eager, fullgraph=True, dynamic=dynamic)
    # A dimension of 2 is not to be taken for the 2 columns of a table.
    for shape in ((3, 2, 4), (5, 3, 6))[: 1 + dynamic]:
        check(compiled, eager, *tensors(*shape))


@pytest.mark.parametrize("name", ["kl", "le_cam", "own"])
def test_a_wrong_argument_has_the_same_message(name: str) -> None:
    divergence = OWN if name == "own" else fk.get_divergence(name)
    compiled = torch.compile(lambda a, b: fk.gaussian_divergence(a, b, divergence), backend="eager")
    with pytest.raises(ValueError, match="pred.*target.*equal shapes"):
        compiled(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(TypeError, match="pred must be a tensor"):
        compiled([1.0], torch.ones(2, 4))


def test_several_tables_fit_in_one_graph() -> None:
    names = ("jensen_shannon", "le_cam", "jensen_shannon", "hockey_stick:2", "hockey_stick:3")

    def all_of_them(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([fk.gaussian_divergence(a, b, name) for name in names])

    a, b = tensors(3, 4)
    compiled = torch.compile(all_of_them, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b), all_of_them(a, b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sweep_is_one_graph(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def step(a: Tensor, b: Tensor, divergence: fk.Divergence, sigma: float) -> tuple[Tensor, Tensor]:
        loss = fk.gaussian_divergence(a, b, divergence, sigma, backend=backend)
        return loss, fk.gaussian_divergence_value_and_grad(a, b, divergence, sigma, backend=backend)[1]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    a, b = tensors(3, 4)
    for alphas in ((0.1, 0.3, 0.5, 0.8), (-1.0, -0.4, 1.5, 3.0)):
        for i, alpha in enumerate(alphas):
            divergence, sigma = fk.get_divergence("alpha", alpha=alpha), 0.5 + i
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                loss, grad = compiled(a, b, divergence, sigma)
            expected = step(a, b, divergence, sigma)
            torch.testing.assert_close((loss, grad), expected, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(*(torch.autograd.grad(x, a)[0] for x in (loss, expected[0])))
    # What damps and what amplifies.
    assert counter.frame_count <= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigma_may_be_a_tensor_of_any_value(backend: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fk.gaussian_divergence, fullgraph=True, backend=counter)
    a, b = tensors(3, 4)
    for value in (0.5, 1.0, 2.0, 3.0):
        sigma = torch.tensor(value)
        found = compiled(a, b, "jensen_shannon", sigma, backend=backend)
        torch.testing.assert_close(found, fk.gaussian_divergence(a, b, "jensen_shannon", sigma, backend=backend))
    assert counter.frame_count == 1


@pytest.mark.quick(compiler=["aot_eager"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sigma_calibrates_in_one_graph_to_the_same_bits(backend: str, compiler: str) -> None:
    eager, module = (fk.GaussianDivergenceLoss(sigma="auto", backend=backend) for _ in range(2))
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for call in range(11):
        a, b = tensors(4, 5, 6, seed=call)
        scale = torch.linspace(0.5, 2, 4)
        values = [criterion(a, (call + 1) * b, sigma_scale=scale) for criterion in (eager, compiled)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, a)[0] for value in values))
        for key, value in eager.state_dict().items():
            assert torch.equal(module.state_dict()[key], value), (call, key)
    assert counter.frame_count == 1 and int(module.calls) == module.calibration_calls
    again = fk.GaussianDivergenceLoss(sigma="auto", backend=backend)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(a, b), module(a, b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_transforms(backend: str) -> None:
    _, b = tensors(3, 4)

    def per_sample(x: Tensor) -> Tensor:
        def loss(pred: Tensor) -> Tensor:
            return fk.gaussian_divergence(pred, b, "jensen_shannon", backend=backend)

        return torch.func.vmap(torch.func.grad(loss))(x)

    x = tensors(5, 3, 4)[0].detach()
    found = torch.compile(per_sample, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, per_sample(x), rtol=1e-5, atol=1e-7)


class Loss(torch.nn.Module):
    def __init__(self, name: str, backend: str) -> None:
        super().__init__()
        self.name, self.backend = name, backend

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        loss = fk.gaussian_divergence(a, b, self.name, 0.5, backend=self.backend)
        return loss, fk.variational_divergence(a, b, self.name, backend=self.backend)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["squared_hellinger", "jensen_shannon"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend: str, name: str, strict: bool) -> None:
    module = Loss(name, backend)
    batch = torch.export.Dim("batch", min=2)
    a, b = (x.detach() for x in tensors(3, 4))
    exported = torch.export.export(module, (a, b), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    for shape in ((3, 4), (7, 4)):
        given = tuple(x.detach() for x in tensors(*shape, seed=1))
        torch.testing.assert_close(exported.module()(*given), module(*given), rtol=1e-6, atol=1e-7)


def test_an_exported_loss_calibrates_as_it_does_in_eager_mode() -> None:
    given = tuple(x.detach() for x in tensors(4, 5))
    eager, module = (fk.GaussianDivergenceLoss(sigma="auto", calibration_calls=2) for _ in range(2))
    exported = torch.export.export(module, given).module()
    for call in range(1, 5):
        a, b = given[0] * call, given[1]
        torch.testing.assert_close(exported(a, b), eager(a, b))


FIRST = """
import torch, fdu_kernels as fk
from torch._subclasses.fake_tensor import FakeTensorMode
class Module(torch.nn.Module):
    def forward(self, a, b):
        return fk.gaussian_divergence(a, b, "jensen_shannon")
a, b = torch.randn(3, 4), torch.randn(3, 4)
with FakeTensorMode():
    fk.gaussian_divergence(torch.empty(3, 4), torch.empty(3, 4), "jensen_shannon")
found = torch.export.export(Module(), (a, b)).module()(a, b)
torch.testing.assert_close(found, fk.gaussian_divergence(a, b, "jensen_shannon"))
"""


@pytest.mark.slow
def test_the_first_use_may_be_a_traced_one() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


RUN = """
import sys, torch
import fdu_kernels  # makes its ops known
package, inputs, expected = sys.argv[1:]
found = torch._inductor.aoti_load_package(package)(*torch.load(inputs))
torch.testing.assert_close(tuple(found), tuple(torch.load(expected)), rtol=1e-5, atol=1e-6)
print("the same")
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_package_runs_in_a_fresh_process(backend: str, tmp_path: Path) -> None:
    module, given = Loss("jensen_shannon", backend), tuple(x.detach() for x in tensors(3, 4))
    exported = torch.export.export(module, given)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "loss.pt2"))
    torch.save(given, tmp_path / "inputs.pt")
    torch.save(module(*given), tmp_path / "expected.pt")
    command = [sys.executable, "-c", RUN, package, str(tmp_path / "inputs.pt"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "the same", done.stderr
