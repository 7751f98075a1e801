"""The losses as modules, and sigma="auto", which calibrates sigma on the first calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.library import custom_op

from fdu_kernels import calls, checks, functional
from fdu_kernels.catalogue import get_divergence
from fdu_kernels.divergence import Divergence
from fdu_kernels.internals import is_under_transforms
from fdu_kernels.registry import check_backend
from fdu_kernels.sharded import is_sharded

CALIBRATION_SAMPLES = 1024
"""sigma="auto" takes the median of so many samples or quantiles, an equal number of places for each call."""


class GaussianDivergenceLoss(nn.Module):
    """:func:`fdu_kernels.gaussian_divergence` as a module.

    With sigma="auto", the first ``calibration_calls`` calls in training mode set sigma^2 so that the median of s over
    all their samples is s0; then sigma is fixed. Each call contributes 1024 / calibration_calls values of s (at least
    1); a larger batch contributes evenly spaced quantiles. Samples with s = 0 (an empty mask row, equal outputs) or a
    non-finite s do not count; until one counts, sigma is 1. The state is in float32 buffers, whatever the module is
    cast to. They follow the inputs' device, a state_dict resumes them exactly, and the host never waits for the
    device.

    Args:
        divergence: a name ("squared_hellinger", "alpha:0.3", ...) or a Divergence.
        sigma: a positive number, or "auto".
        s0: target of "auto" for the median of s, > 0.
        calibration_calls: number of calls that calibrate, >= 1. 8 calls with one sample each estimate the median of a
            chi-square-like s to about 20 %. Activation checkpointing repeats calls, so each counts twice: call the
            loss outside of it.
        synchronize: calibrate on the samples of all processes in torch.distributed's default group, so that they share
            one sigma; every process must make the calibrating calls. Default: each uses its own samples.
        distance, reduction, backend: as in the function.

    Attributes:
        sigma: the given number, or with "auto" a float32 tensor []; both are valid arguments of the functions.
    """

    sigma: float | Tensor
    calls: Tensor
    observed: Tensor

    def __init__(
        self, divergence: str | Divergence = "squared_hellinger", sigma: float | str = 1.0, s0: float = 1.0,
        calibration_calls: int = 8, distance: str = "mean", reduction: str = "mean", backend: str | None = None,
        synchronize: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.divergence = get_divergence(divergence)
        self.auto = sigma == "auto"
        if isinstance(sigma, str):
            checks.check_choice("sigma", sigma, ("auto",))
            sigma = 1.0
        elif isinstance(sigma, Tensor):
            raise TypeError('sigma of the module must be a number or "auto"; pass a tensor [B] to gaussian_divergence')
        checks.check_sigma(sigma, torch.empty(1))
        if not isinstance(s0, (int, float)) or not 0 < s0 < math.inf:
            raise ValueError(f"s0 must be a positive number, not {s0!r}; 'auto' sets the median of s to it")
        if not isinstance(calibration_calls, int) or calibration_calls < 1:
            raise ValueError(f"calibration_calls must be an integer of at least 1, not {calibration_calls!r}")
        checks.check_choice("distance", distance, calls.DISTANCES)
        checks.check_choice("reduction", reduction, calls.REDUCTIONS)
        check_backend(backend)
        self.s0, self.calibration_calls, self.synchronize = float(s0), calibration_calls, synchronize
        self.distance, self.reduction, self.backend = distance, reduction, backend
        if not self.auto:
            self.sigma = float(sigma)
        else:
            places = max(CALIBRATION_SAMPLES // calibration_calls, 1)
            self.register_buffer("sigma", torch.empty((), dtype=torch.float32))
            self.register_buffer("calls", torch.empty((), dtype=torch.int64))
            # One row a call; free places are inf.
            self.register_buffer("observed", torch.empty((calibration_calls, places), dtype=torch.float32))
            # The count is kept twice: reading the buffer at every call would make the host wait.
            self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
            self.reset_parameters()
            self.register_load_state_dict_post_hook(_read_calls)

    def reset_parameters(self) -> None:
        """Forget the calibration, for example after ``to_empty``; the next calls calibrate again."""
        if self.auto:
            for state, value in ((self.sigma, 1.0), (self.calls, 0), (self.observed, math.inf), (self._calls, 0)):
                state.fill_(value)  # type: ignore[union-attr]

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, mask: Tensor | None = None,
        sigma_scale: Tensor | None = None, return_distance: bool = False,
    ) -> Any:  # fmt: skip
        """The loss of [B, ...] denoiser outputs; ``target`` is a constant. With ``return_distance``, also s [B].

        Args:
            pred, target, weight, mask: as in the function.
            sigma_scale: > 0, [B]: sample b has standard deviation sigma * sigma_scale_b, for example by timestep.
                "auto" calibrates the median of s with this scale included.
        """
        if sigma_scale is not None:
            checks.check_sigma_scale(sigma_scale, pred)
        # Once, at the first call on a device. A meta tensor has no values, and would take the state's.
        if self.auto and isinstance(pred, Tensor) and pred.device not in (self.observed.device, torch.device("meta")):
            self.to(pred.device)
        sigma = self._calibrate(pred, target, mask, sigma_scale) if self.auto and self.training else self.sigma
        if sigma_scale is not None:
            # In half precision the product could vanish.
            sigma = sigma * sigma_scale.to(checks.accumulation_dtype(sigma_scale.dtype))
        return functional.gaussian_divergence(
            pred, target, self.divergence, sigma, weight, mask, self.distance, self.reduction, self.backend,
            return_distance=return_distance,  # type: ignore[call-overload]
        )  # fmt: skip

    def _calibrate(self, pred: Tensor, target: Tensor, mask: Tensor | None, sigma_scale: Tensor | None) -> Any:
        compiled = torch.compiler.is_compiling()
        if not compiled and int(self._calls) >= self.calibration_calls:
            return self.sigma
        if not compiled and is_under_transforms():
            remedy = "make its first calls outside, or call eval() on the loss to leave sigma as it is"
            raise RuntimeError(f'sigma="auto" cannot calibrate inside a transform of torch.func; {remedy}')
        checks.check_floating("pred", pred)
        checks.check_floating("target", target)
        # Compiled code holds an op: one graph for calls that calibrate and calls that do not, and the same bits.
        mask, sigma_scale = (None if given is None else given.detach() for given in (mask, sigma_scale))
        sigma = (_calibrated_op if compiled else _calibrated_now)(
            pred.detach(), target.detach(), mask, sigma_scale, self.get_buffer("sigma"), self.observed, self.calls,
            self._calls, self.s0, self.distance, self.synchronize,
        )  # fmt: skip
        if compiled:  # in place: an exported program has only its buffers to remember by
            self.get_buffer("sigma").copy_(sigma)
        else:
            self.sigma = sigma
        return sigma

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianDivergenceLoss:
        # .half() and .double() are meant for the model; the calibration stays in float32 and moves only.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        if self.auto:
            scale = f'sigma="auto", s0={self.s0:g}, calibration_calls={self.calibration_calls}'
            scale += ", synchronize=True" if self.synchronize else ""
        else:
            scale = f"sigma={float(self.sigma):g}"
        return f"{str(self.divergence)!r}, {scale}, distance={self.distance!r}, reduction={self.reduction!r}"


def _calibrated(
    pred: Tensor, target: Tensor, mask: Tensor | None, sigma_scale: Tensor | None, sigma: Tensor, observed: Tensor,
    calls: Tensor, counted: Tensor, s0: float, distance: str, synchronize: bool,
) -> Tensor:  # fmt: skip
    """sigma after another call, whose distances are put into a row of ``observed``; ``counted`` is calls on the CPU."""
    if int(counted) >= len(observed):
        return sigma.clone()
    scale = 1.0 if sigma_scale is None else sigma_scale
    distances = functional.squared_distance(pred, target, scale, mask, distance).to(observed.dtype)
    distances = distances.full_tensor() if is_sharded(distances) else distances  # type: ignore[attr-defined]
    row = _quantiles(distances, observed.shape[1])
    if synchronize and distributed.is_available() and distributed.is_initialized():
        # Rows, not distances: these are of one length, also where batches are not.
        rows = [torch.empty_like(row) for _ in range(distributed.get_world_size())]
        distributed.all_gather(rows, row)
        row = _quantiles(torch.cat(rows), observed.shape[1])
    observed[int(counted)] = row
    # inf sorts behind the samples.
    pool = observed.flatten().sort().values
    samples = torch.isfinite(pool).sum()
    middle = torch.stack([(samples - 1).clamp(min=0) // 2, samples // 2]).clamp(max=len(pool) - 1)
    calls.add_(1)
    counted.add_(1)
    # A new tensor: a graph of an earlier call may still need the old one.
    return torch.where(samples > 0, torch.sqrt(pool[middle].mean() / s0), sigma)


_calibrated_now = torch.inference_mode(False)(torch.no_grad()(_calibrated))
_calibrated_op = custom_op(f"{__package__}::calibrated", _calibrated, mutates_args=("observed", "calls", "counted"))
_calibrated_op.register_fake(lambda *arguments: torch.empty_like(arguments[4]))


def _quantiles(distances: Tensor, places: int) -> Tensor:
    """The finite distances > 0 of [B], sorted, or as many evenly spaced quantiles as there are places; then inf."""
    ordered = torch.where(torch.isfinite(distances) & (distances > 0), distances, torch.inf).sort().values
    samples = torch.isfinite(ordered).sum()
    used = samples.clamp(1, places)
    place = torch.arange(places, device=distances.device)
    # Quantile (place + 1/2) / used; halfway between two samples where it falls on their border.
    position, unit = (2 * place + 1) * samples, 2 * used
    last = len(ordered) - 1
    upper, lower = ordered[(position // unit).clamp(max=last)], ordered[((position - 1) // unit).clamp(0, last)]
    return torch.where(place < samples, (lower + upper) / 2, torch.inf)


def _read_calls(module: Any, incompatible_keys: object) -> None:
    module._calls = module.calls.to("cpu", copy=True)


class VariationalDivergenceLoss(nn.Module):
    """The variational game: the critic minimises ``forward``, which is -:func:`fdu_kernels.variational_divergence`; the
    model minimises ``model_loss``."""

    def __init__(
        self, divergence: str | Divergence = "jensen_shannon", parametrization: str = "log_ratio",
        reduction: str = "mean", backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.divergence = get_divergence(divergence)
        self.divergence.critic_functions(parametrization)
        checks.check_choice("reduction", reduction, calls.REDUCTIONS)
        check_backend(backend)
        self.parametrization, self.reduction, self.backend = parametrization, reduction, backend

    def forward(self, log_ratio_p: Tensor, log_ratio_q: Tensor, mask: Tensor | None = None) -> Tensor:
        """-(E_p[A(v)] - E_q[B(v)]), the loss of the critic."""
        return -functional.variational_divergence(
            log_ratio_p, log_ratio_q, self.divergence, mask, self.parametrization, self.reduction, self.backend
        )

    def model_loss(self, log_ratio_q: Tensor, mask: Tensor | None = None) -> Tensor:
        """-E_q[B(v)], the loss of the model."""
        return functional.variational_model_loss(
            log_ratio_q, self.divergence, mask, self.parametrization, self.reduction, self.backend
        )

    def extra_repr(self) -> str:
        return f"{str(self.divergence)!r}, parametrization={self.parametrization!r}, reduction={self.reduction!r}"


class DensityRatioDivergenceLoss(nn.Module):
    """:func:`fdu_kernels.density_ratio_divergence` as a module."""

    def __init__(
        self, divergence: str | Divergence = "kl", samples_from: str = "q", reduction: str = "mean",
        backend: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.divergence = get_divergence(divergence)
        self.divergence.critic_functions("log_ratio")
        checks.check_choice("samples_from", samples_from, ("q", "p"))
        checks.check_choice("reduction", reduction, calls.REDUCTIONS)
        check_backend(backend)
        self.samples_from, self.reduction, self.backend = samples_from, reduction, backend

    def forward(self, log_ratio: Tensor, weight: Tensor | None = None) -> Tensor:
        """The estimate from log density ratios [B, ...]."""
        return functional.density_ratio_divergence(
            log_ratio, self.divergence, self.samples_from, weight, self.reduction, self.backend
        )

    def extra_repr(self) -> str:
        return f"{str(self.divergence)!r}, samples_from={self.samples_from!r}, reduction={self.reduction!r}"
