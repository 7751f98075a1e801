"""The variational game: a patch critic estimates the density ratio, and the denoiser is trained against it.

The game bounds the divergence from below: D_f(p || q) >= E_p[A(v)] - E_q[B(v)] (Nowozin et al. 2016, arXiv 1606.00709;
Novello et al. 2026, arXiv 2509.21167). The frozen denoiser's outputs are samples of p, the trained one's samples of q.
The critic v raises the bound, and the denoiser lowers it.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import adaptive_avg_pool2d, leaky_relu
from torch.nn.utils.parametrizations import spectral_norm

from fdu_kernels import Divergence, VariationalDivergenceLoss, get_divergence

LAYERS = 4
"""Convolutions of the critic."""
LEAK = 0.2
"""Slope of the LeakyReLU below 0."""
UNIT_CALLS = 8
"""Critic steps whose deviations set the unit in which the critic sees them."""


class PatchCritic(nn.Module):
    """Strided convolutions with spectral norm: a log density ratio for each of many overlapping patches.

    Args:
        channels: C of the input; the mask is one more.
        width: channels after the first convolution; each further one doubles them.
    """

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        widths = [channels + 1, *(width * 2**layer for layer in range(LAYERS - 1)), 1]
        # Kernels of 3 with padding halve any size, rounding up, so that small latents still leave a patch.
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1))
            for before, after in itertools.pairwise(widths)
        )

    def forward(self, shown: Tensor, mask: Tensor) -> Tensor:
        """Log density ratios [N, 1, ceil(H/16), ceil(W/16)] for [N, C, H, W] with masks [N, 1, H, W]."""
        x = torch.cat([shown, mask], 1)
        for layer in self.layers[:-1]:
            x = leaky_relu(layer(x), LEAK)
        return self.layers[-1](x)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs that the game is played on."""

    predicted: Tensor
    """Outputs of the trained denoiser, [N, C, H, W], or of videos [N, C, T, H, W]."""
    wanted: Tensor
    """Outputs of the frozen one, of the same shape; constant."""
    weight: Tensor | None = None
    """Weight of each sample, >= 0, [N]."""
    mask: Tensor | None = None
    """Weight of each element of a latent, >= 0, broadcastable to [N, 1, H, W]."""
    sigma_scale: Tensor | None = None
    """Relative standard deviation of each sample, [N], as in GaussianDivergenceLoss."""

    def by_frame(self) -> Outputs:
        """The frames of videos as samples of their own: the critic looks at images."""
        if self.predicted.ndim == 4:
            return self
        frames = self.predicted.shape[2]

        def parted(output: Tensor) -> Tensor:
            return output.transpose(1, 2).flatten(0, 1)

        def repeated(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.repeat_interleave(frames)

        weight, scale = repeated(self.weight), repeated(self.sigma_scale)
        return Outputs(parted(self.predicted), parted(self.wanted), weight, self.mask, scale)


class VariationalGame:
    """The critic with its optimizer, and the loss that the denoiser is trained by.

    In every training step the critic moves first, the denoiser follows:

        bound = game.critic_step(outputs)
        loss = game.model_loss(outputs)

    In the first steps (30 in the paper) the critic should learn alone.

    The critic sees the squared deviation of each element of an output from the frozen output at the same x_t, in units
    of the deviations at the start. Given x_t, the divergence of two Gaussians is a function of these squares (the
    paper's proposition on closed forms). So the denoiser's gradient vanishes with the deviation, for any critic, and
    the game settles. The paper's critic sees the outputs alone and compares the distributions over all x_t; the
    denoiser then keeps circling around the frozen outputs at a distance.

    The critic computes in float32, also under autocast. Processes average its gradients, so that all have the same
    critic; each must make every ``critic_step``.

    Args:
        divergence: any with a generator f, so not "mse".
        channels: C of the denoiser's outputs.
        learning_rate: learning rate of the critic's AdamW.
        seed: seed of the critic's weights.
        device: device of the outputs.

    Raises:
        ValueError: the divergence has no critic.
    """

    def __init__(
        self,
        divergence: str | Divergence,
        channels: int,
        learning_rate: float = 1e-4,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        divergence = get_divergence(divergence)
        # Where f is piecewise linear, A and B of the log ratio have no slope to follow.
        smooth = divergence.custom is not None or divergence.log_curvature is not None
        self.loss = VariationalDivergenceLoss(divergence, "log_ratio" if smooth else "fgan")
        # On the CPU, so that the weights do not depend on the device.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            self.critic = PatchCritic(channels)
        self.critic.to(device)
        self.optimizer = torch.optim.AdamW(self.critic.parameters(), lr=learning_rate)
        self._mean_square = torch.zeros((), device=device)
        self._calls = 0

    def critic_step(self, outputs: Outputs) -> Tensor:
        """Train the critic by one step on constant outputs, and return the bound before it, a constant []."""
        outputs = outputs.by_frame()
        predicted, wanted = outputs.predicted.detach().float(), outputs.wanted.detach().float()
        mask, scale = _full_mask(outputs.mask, predicted), outputs.sigma_scale
        if self._calls < UNIT_CALLS:
            self._measure(_relative(predicted - wanted, scale), mask)
        with torch.enable_grad(), torch.autocast(predicted.device.type, enabled=False):
            shown = [self._show(output, wanted, mask, scale) for output in (wanted, predicted)]
            # Together, for one power iteration of the spectral norm.
            ratios = self.critic.train()(torch.cat(shown), torch.cat([mask, mask]))
            ratio_p, ratio_q = ratios.chunk(2)
            loss = self.loss(ratio_p, ratio_q, _patch_weight(mask, outputs.weight, ratio_q))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        _average([parameter.grad for parameter in self.critic.parameters() if parameter.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return -loss.detach()

    def model_loss(self, outputs: Outputs) -> Tensor:
        """-E_q[B(v)], what the denoiser minimises, []; only ``predicted`` gets a gradient."""
        outputs = outputs.by_frame()
        predicted, wanted = outputs.predicted.float(), outputs.wanted.detach().float()
        mask = _full_mask(outputs.mask, predicted)
        self.critic.eval().requires_grad_(False)
        try:
            with torch.autocast(predicted.device.type, enabled=False):
                ratio = self.critic(self._show(predicted, wanted, mask, outputs.sigma_scale), mask)
        finally:
            self.critic.requires_grad_(True)
        return self.loss.model_loss(ratio, _patch_weight(mask, outputs.weight, ratio))

    def _show(self, output: Tensor, wanted: Tensor, mask: Tensor, sigma_scale: Tensor | None) -> Tensor:
        return _relative(output - wanted, sigma_scale).square() * mask / self._mean_square.clamp(min=1e-20)

    @torch.no_grad()
    def _measure(self, deviation: Tensor, mask: Tensor) -> None:
        """Take the mean square of the deviations into that of all calls so far."""
        sums = torch.stack([(deviation.square() * mask).mean(), mask.mean()])
        _average([sums])
        self._mean_square += (sums[0] / sums[1].clamp(min=1e-20) - self._mean_square) / (self._calls + 1)
        self._calls += 1

    def state_dict(self) -> dict[str, Any]:
        """The state to continue the game exactly."""
        return {
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mean_square": self._mean_square,
            "calls": self._calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._mean_square = state["mean_square"].to(self._mean_square.device, copy=True)
        self._calls = int(state["calls"])


def _relative(deviation: Tensor, sigma_scale: Tensor | None) -> Tensor:
    return deviation if sigma_scale is None else deviation / sigma_scale.view(-1, 1, 1, 1)


def _full_mask(mask: Tensor | None, output: Tensor) -> Tensor:
    """The mask as float32 [N, 1, H, W]."""
    shape = (len(output), 1, *output.shape[2:])
    return output.new_ones(shape) if mask is None else mask.to(output.dtype).expand(shape)


def _patch_weight(mask: Tensor, weight: Tensor | None, ratio: Tensor) -> Tensor:
    """The weight of each patch, [N, 1, h, w]: the mean of the mask over its area, times the weight of its sample."""
    patches = adaptive_avg_pool2d(mask, (ratio.shape[2], ratio.shape[3]))
    return patches if weight is None else patches * weight.to(patches.dtype).view(-1, 1, 1, 1)


def _average(tensors: list[Tensor]) -> None:
    """Replace tensors by their means over the processes, where there are several."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)  # one message for all
    flat /= distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
