"""The variational game: shapes, masks, who gets gradients, resuming, and that the denoiser arrives for any f."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import fdu_kernels as fk
from fdu.training.critic import Outputs, PatchCritic, VariationalGame


def outputs(count: int = 6, channels: int = 4, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A trained and a frozen denoiser's."""
    wanted, deviation = torch.randn(2, count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return wanted + 0.1 * deviation + 0.05, wanted


@pytest.mark.parametrize("channels", [3, 4, 16])
@pytest.mark.parametrize(
    ("height", "width", "patches"), [(4, 4, 1), (5, 9, 1), (8, 8, 1), (64, 40, 12), (128, 128, 64)]
)
def test_any_latents_have_patches(channels: int, height: int, width: int, patches: int) -> None:
    critic = PatchCritic(channels, width=4)
    ratio = critic(torch.randn(2, channels, height, width), torch.ones(2, 1, height, width))
    assert ratio.shape == (2, 1, math.ceil(height / 16), math.ceil(width / 16)) and ratio.numel() == 2 * patches


def test_the_spectral_norm_of_every_layer_is_1() -> None:
    game = VariationalGame("kl", 4, learning_rate=0.01)
    for _ in range(30):
        game.critic_step(Outputs(*outputs()))
    for layer in game.critic.layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, rel=0.1)


def test_the_critic_raises_the_bound() -> None:
    game = VariationalGame("jensen_shannon", 4, learning_rate=1e-3)
    bounds = [game.critic_step(Outputs(*outputs())).item() for _ in range(40)]
    assert bounds[0] < bounds[-1] < math.log(2)
    assert bounds[-1] > 0.05


def test_the_first_bound_is_that_of_the_critic_as_seeded() -> None:
    predicted, wanted = outputs()
    game = VariationalGame("le_cam", 4, seed=3)
    critic = copy.deepcopy(game.critic)
    unit = (predicted - wanted).square().mean()
    mask = torch.ones(12, 1, 8, 8)
    ratio = critic(torch.cat([torch.zeros_like(wanted), (predicted - wanted).square() / unit]), mask)
    expected = fk.variational_divergence(*ratio.chunk(2), "le_cam")
    torch.testing.assert_close(game.critic_step(Outputs(predicted, wanted)), expected.detach())


def test_only_the_predicted_output_gets_a_gradient_from_the_model_loss() -> None:
    predicted, wanted = (tensor.requires_grad_() for tensor in outputs())
    game = VariationalGame("kl", 4)
    game.critic_step(Outputs(predicted, wanted))
    assert predicted.grad is None and wanted.grad is None
    before = copy.deepcopy(game.critic.state_dict())
    game.model_loss(Outputs(predicted, wanted)).backward()
    assert predicted.grad is not None and predicted.grad.abs().sum() > 0 and wanted.grad is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in game.critic.parameters())
    assert all(torch.equal(value, before[name]) for name, value in game.critic.state_dict().items())


def test_equal_outputs_get_no_gradient() -> None:
    game = VariationalGame("kl", 4)
    predicted, wanted = outputs()
    game.critic_step(Outputs(predicted, wanted))
    same = wanted.clone().requires_grad_()
    game.model_loss(Outputs(same, wanted)).backward()
    assert same.grad is not None and not same.grad.any()


@pytest.mark.parametrize(
    "divergence", ["jensen_shannon", "neyman_chi2", "total_variation", "hockey_stick:1.5", "custom", "kl"]
)
@pytest.mark.quick(divergence=["jensen_shannon", "total_variation", "custom"])
def test_the_denoiser_arrives_for_any_divergence(divergence: str) -> None:
    f = fk.Divergence.from_generator(lambda u: u.square() - u) if divergence == "custom" else divergence
    game = VariationalGame(f, 2, learning_rate=1e-3)
    deviation = torch.full((1, 2, 4, 4), 0.1).requires_grad_()
    optimizer = torch.optim.Adam([deviation], lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(80):
        wanted = torch.randn(4, 2, 4, 4, generator=generator)
        game.critic_step(Outputs(wanted + deviation, wanted))
        if step >= 20:
            optimizer.zero_grad()
            game.model_loss(Outputs(wanted + deviation, wanted)).backward()
            optimizer.step()
    assert deviation.abs().max() < 0.05


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(1)
    one = VariationalGame("kl", 4, seed=5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    other, different = VariationalGame("kl", 4, seed=5), VariationalGame("kl", 4, seed=6)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    bounds = [[game.critic_step(Outputs(*outputs())) for _ in range(3)] for game in (one, other, different)]
    assert bounds[0] == bounds[1] != bounds[2]


@pytest.mark.parametrize("at", [3, 12])
def test_the_game_resumes_exactly(at: int) -> None:
    whole = VariationalGame("kl", 4)
    for step in range(at):
        whole.critic_step(Outputs(*outputs(seed=step)))
    resumed = VariationalGame("kl", 4, seed=9)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for step in range(at, at + 10):
        predicted, wanted = outputs(seed=step)
        assert whole.critic_step(Outputs(predicted, wanted)) == resumed.critic_step(Outputs(predicted, wanted))
        assert whole.model_loss(Outputs(predicted, wanted)) == resumed.model_loss(Outputs(predicted, wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_critic(dtype: torch.dtype) -> None:
    predicted, wanted = outputs()
    half = predicted.to(dtype).requires_grad_()
    plain, cast = VariationalGame("kl", 4), VariationalGame("kl", 4)
    expected = plain.critic_step(Outputs(half.float(), wanted)), plain.model_loss(Outputs(half.float(), wanted))
    with torch.autocast("cpu", torch.bfloat16):
        found = cast.critic_step(Outputs(half, wanted)), cast.model_loss(Outputs(half, wanted))
    assert expected == found and found[1].dtype == torch.float32
    found[1].backward()
    assert half.grad is not None and half.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(32, 32), (1, 1, 32, 32), (3, 1, 32, 32)])
def test_what_the_mask_hides_does_not_count(shape: tuple[int, ...]) -> None:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., :16] = True
    predicted, wanted = outputs(3, size=32)
    other = predicted.clone()
    other[..., 16:] += 5
    bounds, gradients = [], []
    for output in (predicted, other):
        game = VariationalGame("kl", 4)
        bounds.append(game.critic_step(Outputs(output, wanted, mask=mask)))
        leaf = output.clone().requires_grad_()
        game.model_loss(Outputs(leaf, wanted, mask=mask)).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert bounds[0] == bounds[1] and torch.equal(*gradients)
    assert gradients[0][..., :16].any() and not gradients[0][..., 16:].any()
    assert bounds[0] != VariationalGame("kl", 4).critic_step(Outputs(predicted, wanted))


def test_the_bound_is_the_mean_over_the_patches_of_the_mask() -> None:
    predicted, wanted = outputs(2, size=32)
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., :8] = 1
    game = VariationalGame("kl", 4)
    critic = copy.deepcopy(game.critic)
    bound = game.critic_step(Outputs(predicted, wanted, mask=mask))
    shown = (predicted - wanted).square() * mask
    unit = shown.mean() / mask.mean()
    ratio = critic(torch.cat([torch.zeros_like(shown), shown / unit]), torch.cat([mask, mask]))
    weight = torch.tensor([0.5, 0.0])
    expected = fk.variational_divergence(*ratio.chunk(2), "kl", mask=weight.expand(2, 1, 2, 2))
    torch.testing.assert_close(bound, expected.detach())


def test_samples_count_by_their_weight() -> None:
    predicted, wanted = outputs(3)
    game = VariationalGame("kl", 4)
    game.critic_step(Outputs(predicted, wanted))
    leaf = predicted.clone().requires_grad_()
    loss = game.model_loss(Outputs(leaf, wanted, weight=torch.tensor([1.0, 0.0, 3.0])))
    one, three = (
        game.model_loss(Outputs(predicted[:1], wanted[:1])),
        game.model_loss(Outputs(predicted[2:], wanted[2:])),
    )
    torch.testing.assert_close(loss, (one + 3 * three) / 4)
    loss.backward()
    assert leaf.grad is not None and not leaf.grad[1].any() and leaf.grad[2].any()


def test_deviations_are_seen_in_units_of_their_start_and_of_each_sigma() -> None:
    predicted, wanted = outputs(3)
    scale = torch.tensor([0.1, 1.0, 10.0])
    bounds = []
    for factor in (1.0, 1000.0):
        plain, scaled = VariationalGame("kl", 4), VariationalGame("kl", 4)
        deviation = factor * (predicted - wanted)
        bounds.append(plain.critic_step(Outputs(deviation, torch.zeros_like(wanted))))
        stretched = deviation * scale.view(-1, 1, 1, 1)
        bounds.append(scaled.critic_step(Outputs(stretched, torch.zeros_like(wanted), sigma_scale=scale)))
    torch.testing.assert_close(torch.stack(bounds), bounds[0].expand(4), rtol=1e-4, atol=0)


def test_what_is_no_game_is_refused() -> None:
    with pytest.raises(ValueError, match="mse.*no variational form"):
        VariationalGame("mse", 4)
