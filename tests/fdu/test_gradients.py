"""Gradients: surgery, the projection, accumulation and loss scaling; frozen layers keep less, and change no bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import families
import pytest
import torch
from diffusers.models.activations import GEGLU
from families import add_adapter
from torch import Tensor, nn

import fdu
from fdu.models.families import denoiser_of
from fdu.subjects.digits import pipeline as digits
from fdu.training import loop
from fdu.training.frozen_layers import keeping_less
from fdu.training.surgery import GradientSurgery

LAYERS = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1),
    "uneven": lambda: nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
    "grouped": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
    "pointwise": lambda: nn.Conv2d(6, 8, 1),
    "gate": lambda: GEGLU(9, 16),
}


# Surgery


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def flat(module: nn.Module) -> Tensor:
    gradients = [parameter.grad for parameter in module.parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def gradient_of(module: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def losses(module: nn.Module, opposed: bool) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1))
    erasing = module(x).square().mean()
    return erasing, (-2 * erasing + module(y).mean() if opposed else 2 * erasing + module(y).mean() / 10)


def run(module: nn.Module, surgery: GradientSurgery, opposed: bool, scale: float = 1.0) -> None:
    erasing, preserving = losses(module, opposed)
    with surgery.preserving():
        (scale * preserving).backward(retain_graph=True)
    (scale * erasing).backward()


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_what_conflicts_with_preservation_is_projected_off(weight: float) -> None:
    module = network()
    erasing, preserving = (gradient_of(module, loss) for loss in losses(module, opposed=True))
    assert erasing @ preserving < 0
    surgery = GradientSurgery(module.parameters())
    run(module, surgery, opposed=True)
    surgery.combine(weight)
    projected = flat(module) - weight * preserving
    torch.testing.assert_close(projected, erasing - erasing @ preserving / (preserving @ preserving) * preserving)
    assert abs(projected @ preserving) < 1e-6 * erasing.norm() * preserving.norm()


def test_without_a_conflict_it_is_the_weighted_sum() -> None:
    module = network()
    erasing, preserving = (gradient_of(module, loss) for loss in losses(module, opposed=False))
    assert erasing @ preserving > 0
    surgery = GradientSurgery(module.parameters())
    run(module, surgery, opposed=False)
    surgery.combine(3.0)
    torch.testing.assert_close(flat(module), erasing + 3 * preserving)


def test_the_dot_product_runs_over_all_parameters_together() -> None:
    one, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    surgery = GradientSurgery([one, other])
    with surgery.preserving():
        one.grad, other.grad = torch.tensor([1.0, 0.0]), torch.tensor([2.0])
    one.grad, other.grad = torch.tensor([-1.0, 5.0]), torch.tensor([1.0])
    # The first conflicts, all of them together do not.
    surgery.combine(1.0)
    assert torch.equal(one.grad, torch.tensor([0.0, 5.0])) and torch.equal(other.grad, torch.tensor([3.0]))


def test_both_gradients_accumulate_before_they_are_joined() -> None:
    module = network()
    surgery = GradientSurgery(module.parameters())
    for _ in range(3):
        run(module, surgery, opposed=True)
    surgery.combine(1.0)
    tripled = flat(module)
    module.zero_grad()
    run(module, surgery, opposed=True)
    surgery.combine(1.0)
    torch.testing.assert_close(tripled, 3 * flat(module))


def test_joining_forgets_the_preserving_gradient() -> None:
    module = network()
    surgery = GradientSurgery(module.parameters())
    run(module, surgery, opposed=True)
    surgery.combine(1.0)
    module.zero_grad()
    erasing, _ = losses(module, opposed=True)
    erasing.backward()
    before = flat(module)
    surgery.combine(1.0)
    assert torch.equal(flat(module), before)


def test_parameters_that_one_loss_does_not_reach() -> None:
    erased, kept, neither = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    surgery = GradientSurgery([erased, kept, neither])
    with surgery.preserving():
        kept.grad = torch.tensor([2.0])
    erased.grad = torch.tensor([3.0])
    surgery.combine(0.5)
    assert erased.grad == 3 and kept.grad == 1 and neither.grad is None


def test_a_vanishing_preserving_gradient_changes_nothing() -> None:
    module = network()
    surgery = GradientSurgery(module.parameters())
    with surgery.preserving():
        (0 * module(torch.ones(1, 3)).sum()).backward()
    module(torch.ones(1, 3)).sum().backward()
    before = flat(module)
    surgery.combine(1.0)
    assert torch.equal(flat(module), before)


def test_the_result_scales_with_the_loss() -> None:
    results = []
    for scale in (1.0, 65536.0):
        module = network()
        surgery = GradientSurgery(module.parameters())
        run(module, surgery, True, scale)
        surgery.combine(1.0)
        results.append(flat(module) / scale)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("side", ["erasing", "preserving"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_what_is_not_finite_stays_for_the_scaler_to_find(side: str, value: float, weight: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    surgery = GradientSurgery([parameter])
    bad, good = torch.tensor([value, 1.0]), torch.tensor([1.0, -2.0])
    with surgery.preserving():
        parameter.grad = bad if side == "preserving" else good
    parameter.grad = good.clone() if side == "preserving" else bad
    surgery.combine(weight)
    assert not torch.isfinite(parameter.grad).all()


def test_an_error_while_preserving_leaves_the_gradients_in_place() -> None:
    module = network()
    surgery = GradientSurgery(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    before = flat(module)
    with pytest.raises(KeyboardInterrupt), surgery.preserving():
        raise KeyboardInterrupt
    assert torch.equal(flat(module), before)


def test_a_preserving_gradient_of_mere_rounding_turns_nothing() -> None:
    module = network()
    erasing, preserving = (gradient_of(module, loss) for loss in losses(module, opposed=True))
    assert erasing @ preserving < 0
    surgery = GradientSurgery(module.parameters())
    tiny = 1e-6 * float(erasing.norm() / preserving.norm())
    losses_again = losses(module, opposed=True)
    with surgery.preserving():
        (tiny * losses_again[1]).backward(retain_graph=True)
    losses_again[0].backward()
    surgery.combine(1.0)
    torch.testing.assert_close(flat(module), erasing + tiny * preserving)


# Frozen layers


def kept_by(layer: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The output, and the bytes of activations that wait for the backward pass; parameters are there anyway."""
    storages: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
        output = output if isinstance(output, Tensor) else output[0]
    return output, sum(storages.values())


def measured(layer: nn.Module, x: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor, int]:
    """Output, gradient of the input, bytes kept."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        # What comes from before is not the layer's to keep.
        output, kept = kept_by(layer, 1 * x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (gradient,) = torch.autograd.grad(output, x, weights)
    return output, gradient, kept


def input_for(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 9, generator=generator) if isinstance(layer, GEGLU) else torch.randn(2, 6, 11, 10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_same_bits_and_less_kept(name: str, autocast: bool, layout: torch.memory_format) -> None:
    layer = LAYERS[name]().requires_grad_(False)
    x = input_for(layer)
    if x.ndim == 4:
        layer, x = layer.to(memory_format=layout), x.contiguous(memory_format=layout)
    expected = measured(layer, x, autocast)
    with keeping_less(layer):
        found = measured(layer, x, autocast)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[0].dtype == expected[0].dtype and found[1].dtype == expected[1].dtype
    assert found[2] < expected[2]
    if name != "gate" and not autocast:
        assert found[2] == 0


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives(name: str) -> None:
    layer = LAYERS[name]().double().requires_grad_(False)
    x = input_for(layer)[:1].double().requires_grad_()
    with keeping_less(layer):
        assert torch.autograd.gradcheck(layer, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_trained_parameters_get_their_gradients(trained: str) -> None:
    layer = LAYERS["plain"]().requires_grad_(False)
    parameter = getattr(layer, trained).requires_grad_()
    x = input_for(layer).requires_grad_()
    expected = torch.autograd.grad(layer(x).square().sum(), [parameter, x])
    with keeping_less(layer):
        found = torch.autograd.grad(layer(x).square().sum(), [parameter, x])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_no_graph_where_none_is_asked_for() -> None:
    layer = LAYERS["plain"]().requires_grad_(False)
    with keeping_less(layer):
        assert not layer(input_for(layer)).requires_grad
        with torch.no_grad():
            assert not layer(input_for(layer).requires_grad_()).requires_grad


def test_what_may_compute_something_else_stays() -> None:
    class Own(nn.Conv2d):
        pass

    class OwnGate(GEGLU):
        pass

    layers = nn.ModuleList(
        [
            Own(4, 4, 3),
            OwnGate(4, 4),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.Conv2d(4, 4, 3, 1, 1, padding_mode="circular"),
        ]
    )
    replaced = nn.Conv2d(4, 4, 1)
    replaced._conv_forward = own = lambda *given: given[0]  # somebody else's
    layers.append(replaced)
    before = [set(vars(layer)) for layer in layers]
    with keeping_less(layers):
        assert [set(vars(layer)) for layer in layers] == before
        assert replaced._conv_forward is own
    assert replaced._conv_forward is own


def test_layers_come_back_after_an_error() -> None:
    layers = nn.Sequential(LAYERS["plain"](), LAYERS["gate"]())
    before = [set(vars(layer)) for layer in layers]
    with pytest.raises(KeyError, match="broken"), keeping_less(layers):
        assert [set(vars(layer)) for layer in layers] != before
        raise KeyError("broken")
    assert [set(vars(layer)) for layer in layers] == before


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_denoiser_with_an_adapter(name: str, checkpointed: bool) -> None:
    pipeline = families.build(name)
    add_adapter(pipeline, "unet", ("attn2.to_k", "attn2.to_v"))
    unet = pipeline.unet
    for parameter_name, parameter in unet.named_parameters():
        parameter.requires_grad_(".fdu." in parameter_name)
    unet.train()
    if checkpointed:
        unet.enable_gradient_checkpointing()
    model = denoiser_of(pipeline)
    conditioning = model.encode(["a photo of the digit three"])
    noisy = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))

    class Predict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, noisy: Tensor) -> Tensor:
            return model.predict(noisy, torch.tensor([400]), conditioning)

    def run() -> tuple[list[Tensor], int]:
        output, kept = kept_by(Predict(), noisy)
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), trained)], kept

    expected, before = run()
    with keeping_less(unet):
        found, after = run()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert any(tensor.abs().max() > 0 for tensor in found[1:])
    assert after < (1.001 if checkpointed else 0.85) * before


@pytest.mark.parametrize("others", [{}, {"gradient_checkpointing": True}], ids=str)
def test_an_erasure_is_the_same(quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch, others: dict[str, Any]) -> None:
    def erase() -> dict[str, Tensor]:
        pipeline = digits.load_pipeline()
        settings = {**quick, "max_train_steps": 2, **others}
        result = fdu.erase(pipeline, *digits.concepts("three", "eight"), **settings)
        assert not any("_conv_forward" in vars(part) for part in pipeline.unet.modules())
        return {name: tensor.detach().clone() for name, tensor in result.trainable.named_parameters().items()}

    found = erase()
    monkeypatch.setattr(loop, "keeping_less", lambda module: nullcontext())
    expected = erase()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
