"""The package's shape: no module imports another in a circle, an argument or a backend is stated where it belongs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels import catalogue, registry
from fdu_kernels.calls import ExpectationCall, GaussianCall, Kind
from fdu_kernels.critic import CriticRow

PACKAGE = Path(fk.__file__).parent
LAYERS = (
    "internals", "scalar checks", "critic profiles", "tabulation", "custom", "divergence", "catalogue", "constants",
    "calls", "formulas", "registry build", "kernels", "autograd torch_ops transforms sharded", "dispatch", "functional",
    "modules", "",
)  # fmt: skip
"""Modules by layer; the last is the package itself. What stands in one imports those before."""


def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports anywhere, also within functions and for types alone."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                named = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for one in named:
                parts = one.split(".")
                if parts[0] != "fdu_kernels":
                    continue
                inside = [".".join(parts[1:end]) for end in range(len(parts), 0, -1)]
                # The longest part of the name that is a module.
                found[name].add(
                    next(
                        part
                        for part in inside
                        if (PACKAGE / f"{part.replace('.', '/')}.py").exists()
                        or (PACKAGE / part.replace(".", "/") / "__init__.py").exists()
                    )
                )
    return found


def test_layers_point_one_way() -> None:
    place = {module: i for i, layer in enumerate(LAYERS) for module in (layer.split(" ") if layer else [""])}
    found = imports()
    tops = {name.split(".")[0] for name in found}
    assert tops == set(place), "a module without a layer, or a layer without its module"
    for name, imported in found.items():
        for other in imported:
            if name.startswith("kernels") and other.startswith("kernels"):
                continue
            assert place[other.split(".")[0]] < place[name.split(".")[0]], f"{name or 'the package'} imports {other}"


def test_no_module_imports_another_in_a_circle() -> None:
    found, done = imports(), set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in found[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in found:
        visit(name, ())


def test_the_registry_imports_no_kernels() -> None:
    assert not any(name.startswith("kernels") for name in imports()["registry"])


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("distance", {"calls", "functional"}),
        ("samples_from", {"functional"}),
        ("parametrization", {"calls", "functional"}),
    ],
)
def test_an_argument_is_stated_in_few_places(argument: str, wanted: set[str]) -> None:
    """Beside the module that has it and the kernels that use it: what a call holds, and the function that takes it."""
    stating = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg) and node.arg == argument:
                stating.add(path.stem)
    assert stating - {"modules", "divergence", "critic", "custom", "constants"} == wanted - ({"calls"} - stating)
    backends = [path for path in (PACKAGE / "kernels").rglob("*.py") if f"call.{argument}" in path.read_text()]
    assert len(backends) <= 2 and not any(
        isinstance(node, ast.arg) and node.arg == argument
        for path in (PACKAGE / "kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    )


class Toy:
    """A backend of six short functions: kl, and functions of the density ratio by their PyTorch operations."""

    FUSES_FORWARD = False

    def why_unavailable(self) -> str | None:
        return None

    def why_unsuitable(self, kind: Kind) -> str | None:
        return kind.why_not_fused(float64=True)

    def gaussian_forward(self, call: GaussianCall) -> tuple[Tensor, Tensor]:
        difference = (call.pred - call.target).reshape(len(call.pred), -1)
        assert call.profile.k == 0 and call.mask is None and call.distance == "sum"
        weight = call.profile.c if call.weight is None else call.profile.c * call.weight
        one = torch.ones(len(difference))
        return weight * difference.square().sum(1) / call.sigma**2, 2 * weight * one / call.sigma**2

    def gaussian_backward(self, call: GaussianCall, coefficient: Tensor) -> Tensor:
        return coefficient.reshape(-1, *[1] * (call.pred.ndim - 1)) * (call.pred - call.target)

    def gaussian_value_and_grad(self, call: GaussianCall, grad_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        losses, coefficient = self.gaussian_forward(call)
        grad = self.gaussian_backward(call, coefficient * call.grad_scale / call.divisor)
        value = losses if call.reduction == "none" else losses.sum() / call.divisor
        return value, grad if grad_out is None else grad_out.copy_(grad)

    def expectation_forward(self, call: ExpectationCall) -> Tensor:
        terms = call.function.scalar().value_at(call.v)
        return {"none": terms, "mean": terms.mean(), "sum": terms.sum()}[call.reduction]

    def expectation_backward(self, call: ExpectationCall, upstream: Tensor) -> Tensor:
        slope = call.function.scalar().slope_at(call.v) * upstream
        return slope / call.v.numel() if call.reduction == "mean" else slope

    def expectation_value_and_grad(self, call: ExpectationCall) -> tuple[Tensor, Tensor]:
        return self.expectation_forward(call), self.expectation_backward(call, torch.tensor(call.grad_scale))


def test_a_backend_is_one_object_of_six_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.PLACES, "toy", Toy())
    registry.backend_named.cache_clear()
    pred, target = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)

    def losses(pred: Tensor, backend: str) -> Tensor:
        loss = fk.gaussian_divergence(pred, target, "kl", 0.5, distance="sum", backend=backend)
        return loss + fk.density_ratio_divergence(pred, "jensen_shannon", backend=backend)

    expected = losses(pred, "torch")
    (expected_grad,) = torch.autograd.grad(expected, pred, create_graph=True)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    for function in (losses, compiled):
        value = function(pred, "toy")
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, pred)[0], expected_grad)
    torch.testing.assert_close(torch.func.grad(losses)(pred.detach(), "toy"), expected_grad)
    batch = torch.stack([pred.detach()] * 2)
    torch.testing.assert_close(torch.func.vmap(lambda x: losses(x, "toy"))(batch)[1], expected)
    registry.backend_named.cache_clear()


def test_a_divergence_is_one_entry_of_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    from fdu.cli.divergences import rows, table

    made = fk.Divergence(
        "three_kl",
        aliases=("triple",),
        formula="3 u log u",
        advice="For this test.",
        generator=lambda u: 3 * torch.xlogy(u, u),
        log_curvature=lambda v: v + torch.log(torch.tensor(3.0)),
        exponential=(1.5, 0.0),
        log_ratio_rows=(CriticRow(const=3, linear=3), CriticRow(exp=3, exp_rate=1)),
    )
    monkeypatch.setitem(catalogue.CATALOGUE, "three_kl", made)
    monkeypatch.setitem(catalogue._NAMES, "triple", "three_kl")
    monkeypatch.setitem(catalogue._NAMES, "three_kl", "three_kl")
    catalogue._build.cache_clear()
    pred, target = torch.randn(3, 4), torch.randn(3, 4)
    for backend, reason in fk.backends().items():
        if reason is None:
            found = fk.gaussian_divergence(pred, target, "triple", backend=backend)
            torch.testing.assert_close(found, 3 * fk.gaussian_divergence(pred, target, "kl"))
            ratio = fk.density_ratio_divergence(pred, "three_kl", backend=backend)
            torch.testing.assert_close(ratio, 3 * fk.density_ratio_divergence(pred, "kl"))
    assert "three_kl" in fk.divergences() and re.search(r"three_kl .*3 u log u", table(rows()))
    catalogue._build.cache_clear()
