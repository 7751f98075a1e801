"""torch.func and forward differentiation of every loss on every backend: right, and one launch where vmap can fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import fdu_kernels as fk
from fdu_kernels import registry

Loss = Callable[[Tensor], Tensor]
OWN = fk.Divergence.from_generator(lambda u: (u - 1) ** 2 / (u + 3), "own")
NAMES = ("mse", "kl", "squared_hellinger", "pearson_chi2", "jensen_shannon", "le_cam", "total_variation", "alpha:2.5")
DIVERGENCES = {**{name: fk.get_divergence(name) for name in NAMES}, "own": OWN}
# The interpreter takes a second a launch; on a GPU it is Triton itself.
BACKENDS = [
    name
    for name, reason in fk.backends().items()
    if reason is None and not (name == "triton" and fk.backends()["cuda"])
]
FORMS = ["gaussian", "variational", "ratio"]


class Counted:
    """A backend, and how often each of its functions is called."""

    def __init__(self, name: str) -> None:
        self.real, self.calls = registry.backend_named(name), []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.real, name)
        if not callable(found) or name.startswith("why"):
            return found

        def call(*arguments: Any) -> Any:
            self.calls.append(name)
            return found(*arguments)

        return call


@pytest.fixture(params=BACKENDS)
def counted(request: pytest.FixtureRequest) -> Iterator[Counted]:
    """A backend registered under the name "counted"."""
    made, patch = Counted(request.param), pytest.MonkeyPatch()
    patch.setitem(registry.PLACES, "counted", made)
    registry.backend_named.cache_clear()
    yield made
    patch.undo()
    registry.backend_named.cache_clear()


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_of(form: str, divergence: fk.Divergence, backend: str, reduction: str = "mean") -> Loss:
    """A loss of [3, 2, 4], of everything that it takes."""
    if form != "gaussian" and divergence == OWN:
        backend = "torch"
    other, mask = tensor(3, 2, 4, seed=1), tensor(3, 1, 4, seed=2) > -0.5
    weight, common = torch.tensor([1.0, 2.0, 0.5]), {"reduction": reduction, "backend": backend}
    if form == "gaussian":
        options = {"sigma": torch.tensor([0.7, 1.0, 2.0]), "weight": weight, "mask": mask, **common}
        return lambda x: fk.gaussian_divergence(x, other, divergence, **options)
    if form == "variational":
        return lambda x: fk.variational_divergence(x, other, divergence, mask=mask, **common)
    return lambda x: fk.density_ratio_divergence(x, divergence, "p", weight, **common)


def cases() -> list[Any]:
    return [
        pytest.param(form, divergence, id=f"{form}-{name}")
        for form in FORMS
        for name, divergence in DIVERGENCES.items()
        if form == "gaussian" or name != "mse"
    ]


@pytest.mark.quick(divergence=[DIVERGENCES[name] for name in ("squared_hellinger", "jensen_shannon", "own")])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "divergence"), cases())
def test_every_transform(form: str, divergence: fk.Divergence, backend: str) -> None:
    loss, exact = loss_of(form, divergence, backend), loss_of(form, divergence, "torch")
    x, tangent, batch = tensor(3, 2, 4), tensor(3, 2, 4, seed=3), tensor(2, 3, 2, 4, seed=4)

    def eager(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(exact(leaf), leaf)[0]

    def same(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-6)

    gradient, second = eager(x), torch.autograd.functional.hessian(exact, x)
    same(grad(loss)(x), gradient)
    same(jacrev(loss)(x), gradient)
    same(jacfwd(loss)(x), gradient)
    same(jvp(loss, (x,), (tangent,))[1], (gradient * tangent).sum())
    same(vjp(loss, x)[1](torch.tensor(-2.0))[0], -2 * gradient)
    same(hessian(loss)(x), second)
    same(grad(lambda x: grad(loss)(x).sin().sum())(x), torch.tensordot(eager(x).cos(), second, 3))
    same(vmap(loss)(batch), torch.stack([exact(one) for one in batch]))
    same(vmap(grad(loss))(batch), torch.stack([eager(one) for one in batch]))
    same(functionalize(loss)(x), exact(x))
    same(grad(functionalize(loss))(x), gradient)
    with forward_ad.dual_level():
        same(forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent, (gradient * tangent).sum())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["squared_hellinger", "jensen_shannon"])
def test_value_and_grad_under_transforms(counted: Counted, name: str, reduction: str) -> None:
    target, mask, batch = tensor(3, 5, seed=1), tensor(3, 5, seed=2) > 0, tensor(4, 3, 5)

    def both(x: Tensor, backend: str = "counted") -> tuple[Tensor, Tensor]:
        options = {"mask": mask, "reduction": reduction, "grad_scale": 3.0}
        return fk.gaussian_divergence_value_and_grad(x, target, name, backend=backend, **options)

    expected = [torch.stack(parts) for parts in zip(*(both(one, "torch") for one in batch), strict=True)]
    counted.calls.clear()
    torch.testing.assert_close(list(vmap(both)(batch)), expected, rtol=1e-5, atol=1e-7)
    if counted.real is not registry.backend_named("torch"):
        assert counted.calls == ["gaussian_value_and_grad"]
    # The gradient's own derivative is the Hessian.
    found = jacrev(lambda x: both(x)[1])(batch[0])

    def loss(x: Tensor) -> Tensor:
        return 3 * fk.gaussian_divergence(x, target, name, mask=mask, reduction=reduction, backend="torch").sum()

    torch.testing.assert_close(found, torch.autograd.functional.hessian(loss, batch[0]), rtol=1e-4, atol=1e-6)
    scaled = vmap(lambda x, scale: fk.gaussian_divergence_value_and_grad(x, target, name, grad_scale=scale)[1])
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.testing.assert_close(scaled(batch, scale)[2], 3 * scaled(batch, scale / scale)[2], rtol=1e-5, atol=1e-7)


def test_value_and_grad_of_the_other_losses_under_transforms(counted: Counted) -> None:
    p, q = tensor(4, 3, 5), tensor(4, 3, 5, seed=1)
    bound = vmap(lambda p, q, backend="counted": fk.variational_divergence_value_and_grad(p, q, "kl", backend=backend))
    ratio = vmap(lambda v, backend="counted": fk.density_ratio_divergence_value_and_grad(v, "le_cam", backend=backend))
    for found, each in (
        (bound(p, q), [fk.variational_divergence_value_and_grad(a, b, "kl") for a, b in zip(p, q, strict=True)]),
        (ratio(p), [fk.density_ratio_divergence_value_and_grad(v, "le_cam") for v in p]),
    ):
        expected = tuple(torch.stack(parts) for parts in zip(*each, strict=True))
        torch.testing.assert_close(tuple(found), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["pred", "target", "sigma", "weight", "mask", "all", "shared mask", "scalar sigma"])
def test_vmap_folds_into_one_launch(counted: Counted, what: str) -> None:
    size = 5
    full = {
        "pred": tensor(size, 3, 2, 4), "target": tensor(size, 3, 2, 4, seed=1), "sigma": tensor(size, 3, seed=2).exp(),
        "weight": tensor(size, 3, seed=3).exp(), "mask": (tensor(size, 3, 1, 4, seed=4) > -1).float(),
    }  # fmt: skip
    if what == "shared mask":
        full["mask"] = full["mask"][:, 0]
    if what == "scalar sigma":
        full["sigma"] = full["sigma"][:, 0]
    mapped = set(full) if what in ("all", "shared mask", "scalar sigma") else {what}
    given = {key: value if key in mapped else value[0] for key, value in full.items()}
    # The dimension of pred that is mapped over is not always the first.
    dims = {key: 0 if key in mapped else None for key in full}
    if "pred" in mapped:
        given["pred"], dims["pred"] = given["pred"].movedim(0, 2), 2

    def loss(arguments: dict[str, Tensor], backend: str = "counted") -> Tensor:
        return fk.gaussian_divergence(divergence="le_cam", distance="mean", backend=backend, **arguments)

    singles = [{key: value[i] if key in mapped else value[0] for key, value in full.items()} for i in range(size)]
    expected = torch.stack([loss(single, "torch") for single in singles])
    counted.calls.clear()
    torch.testing.assert_close(vmap(loss, in_dims=(dims,))(given), expected, rtol=1e-5, atol=1e-7)
    if counted.real is registry.backend_named("torch"):
        return
    assert counted.calls == ["gaussian_forward"]
    counted.calls.clear()
    vmap(
        grad(lambda pred, rest: loss({"pred": pred, **rest})),
        in_dims=(dims["pred"], {k: dims[k] for k in dims if k != "pred"}),
    )(given["pred"], {key: value for key, value in given.items() if key != "pred"})
    assert counted.calls == ["gaussian_forward", "gaussian_value_and_grad"]


def test_nested_vmaps_are_one_launch_too(counted: Counted) -> None:
    pred, target = tensor(2, 4, 3, 5), tensor(4, 3, 5, seed=1)

    def loss(pred: Tensor, target: Tensor) -> Tensor:
        return fk.gaussian_divergence(pred, target, backend="counted")

    counted.calls.clear()
    found = vmap(vmap(loss), in_dims=(0, None))(pred, target)
    expected = [[fk.gaussian_divergence(pred[i, j], target[j]) for j in range(4)] for i in range(2)]
    torch.testing.assert_close(found, torch.tensor(expected))
    if counted.real is not registry.backend_named("torch"):
        assert counted.calls == ["gaussian_forward"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_per_sample_gradients(backend: str, dtype: torch.dtype) -> None:
    model = nn.Linear(4, 4).to(dtype)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    inputs, target = tensor(6, 4, dtype=dtype), tensor(6, 4, seed=1)

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return fk.gaussian_divergence(functional_call(model, parameters, x[None]), target[None], "kl", backend=backend)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, target)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-3}
    for i in range(6):
        model.zero_grad()
        fk.gaussian_divergence(model(inputs[i : i + 1]), target[i : i + 1], "kl", backend="torch").backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(found[name][i], value.grad, **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_stay_constants_under_transforms(backend: str) -> None:
    pred, target, sigma = tensor(3, 4), tensor(3, 4, seed=1), torch.ones(3)

    def loss(pred: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
        return fk.gaussian_divergence(pred, target, sigma=sigma, backend=backend)

    for argument in (1, 2):
        assert not grad(loss, argnums=argument)(pred, target, sigma).any()
        tangents = [torch.zeros_like(x) for x in (pred, target, sigma)]
        tangents[argument] += 1
        assert jvp(loss, (pred, target, sigma), tuple(tangents))[1] == 0


def test_a_calibrating_loss_says_that_it_cannot_be_transformed() -> None:
    criterion = fk.GaussianDivergenceLoss(sigma="auto")
    pred, target = tensor(3, 4), tensor(3, 4, seed=1)
    with pytest.raises(RuntimeError, match="cannot calibrate inside.*transform.*torch.func.*eval"):
        grad(criterion)(pred, target)
    for _ in range(criterion.calibration_calls):
        criterion(pred, target)
    expected = fk.gaussian_divergence_value_and_grad(pred, target, sigma=criterion.sigma)[1]
    torch.testing.assert_close(grad(criterion)(pred, target), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_forward_differentiation_twice(form: str, backend: str) -> None:
    loss, x = loss_of(form, fk.get_divergence("pearson_chi2"), backend), 0.3 * tensor(3, 2, 4)
    torch.testing.assert_close(jacfwd(jacfwd(loss))(x), jacrev(jacrev(loss))(x), rtol=1e-4, atol=1e-5)
    third = jacfwd(jacfwd(grad(loss)))(x)
    torch.testing.assert_close(third, jacrev(jacrev(grad(loss)))(x), rtol=1e-3, atol=1e-4)


def test_no_calls_make_an_empty_result(counted: Counted) -> None:
    nothing = torch.empty(0, 2, 3)
    loss = lambda x: fk.gaussian_divergence(x, x.detach(), backend="counted")  # noqa: E731
    assert vmap(loss)(nothing).shape == (0,) and vmap(grad(loss))(nothing).shape == (0, 2, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_negative_bit_is_seen_under_transforms(backend: str) -> None:
    pred = torch.view_as_complex(tensor(3, 4, 2)).conj().imag
    assert pred.is_neg()
    found = vmap(lambda x, y: fk.gaussian_divergence(x[None], y[None], backend=backend))(pred, tensor(3, 4))
    expected = fk.gaussian_divergence(pred, tensor(3, 4), reduction="none", backend="torch")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_under_transforms_is_rounded_once(backend: str) -> None:
    pred, target = (tensor(4, 10_000) * 1e-2).half(), (tensor(4, 10_000, seed=1) * 1e-2).half()
    loss = lambda x: fk.gaussian_divergence(x, target, "kl", reduction="none", backend=backend)  # noqa: E731
    wide = lambda x: fk.gaussian_divergence(x, target.double(), "kl", reduction="none")  # noqa: E731
    exact = jvp(wide, (pred.double(),), (pred.double(),))
    torch.testing.assert_close(jvp(loss, (pred,), (pred,))[1].double(), exact[1], rtol=1e-5, atol=0)
    scale = torch.tensor(65536.0)
    both = lambda x, y: fk.gaussian_divergence_value_and_grad(x, y, grad_scale=scale, backend=backend)[1]  # noqa: E731
    found = vmap(both)(pred[:, None], target[:, None])
    expected = torch.stack([both(x, y) for x, y in zip(pred[:, None], target[:, None], strict=True)])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_autograds_batched_gradients(form: str, backend: str) -> None:
    loss, x = loss_of(form, fk.get_divergence("le_cam"), backend, "none"), tensor(3, 2, 4).requires_grad_()
    value = loss(x)
    upstream = torch.randn(5, *value.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(value, x, upstream, is_grads_batched=True, retain_graph=True)
    expected = torch.stack([torch.autograd.grad(value, x, one, retain_graph=True)[0] for one in upstream])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["squared_hellinger", "le_cam"])
def test_second_derivatives_with_dual_numbers(name: str, backend: str) -> None:
    pred, target, tangent = tensor(3, 4), tensor(3, 4, seed=1), tensor(3, 4, seed=2)

    def found(backend: str) -> list[Tensor]:
        leaf = pred.clone().requires_grad_()
        before = fk.gaussian_divergence(leaf, target, name, backend=backend)
        with forward_ad.dual_level():
            loss = fk.gaussian_divergence(forward_ad.make_dual(leaf, tangent), target, name, backend=backend)
            dual = forward_ad.make_dual(pred, tangent)
            _, grad = fk.gaussian_divergence_value_and_grad(dual, target, name, backend=backend)
            upstream = forward_ad.make_dual(torch.tensor(1.0), torch.tensor(2.0))
            grads = *torch.autograd.grad(loss, leaf), grad, *torch.autograd.grad(before, leaf, upstream)
            return [forward_ad.unpack_dual(one).tangent for one in grads]

    torch.testing.assert_close(found(backend), found("torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_constants_and_do_not_overflow(backend: str) -> None:
    pred, target = tensor(3, 4), tensor(3, 4, seed=1)

    def loss(weight: Tensor) -> Tensor:
        return fk.gaussian_divergence_value_and_grad(pred, target, "le_cam", weight=weight, backend=backend)[0]

    assert not grad(loss)(torch.ones(3)).any()

    def gradient(pred: Tensor) -> Tensor:
        options: Any = {"sigma": 20.0, "weight": torch.ones(3).half(), "grad_scale": torch.tensor(131072.0)}
        return fk.gaussian_divergence_value_and_grad(pred, target, "le_cam", backend=backend, **options)[1]

    torch.testing.assert_close(vmap(gradient)(pred[None])[0], gradient(pred))
