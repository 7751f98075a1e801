"""Calls: one object holds the checked arguments of a loss for a backend."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdu_kernels import checks
from fdu_kernels.critic import ElementFunction
from fdu_kernels.divergence import Function
from fdu_kernels.internals import are_constants, is_plain
from fdu_kernels.profiles import GaussianProfile, widest_dtype

REDUCTIONS = ("none", "mean", "sum")
DISTANCES = ("mean", "sum")
PARAMETRIZATIONS = ("log_ratio", "fgan")


class Kind(NamedTuple):
    """The properties of a call that decide which backend can take it."""

    device: torch.device
    dtype: torch.dtype  # of pred or the log ratio
    other: torch.dtype  # of target
    form: str  # of a Gaussian loss "exponential" or "table"; of the density ratio "critic", or "python" for code

    def why_not_fused(self, float64: bool = False) -> str | None:
        """Why a fused backend cannot take it, or None; ``float64``: whether that backend takes float64."""
        if self.form == "python":
            limit = "fused backends take its Gaussian losses, but not its critics or density ratios"
            return f'a generator of your own is Python code: {limit}; use backend="torch"'
        if not float64 and torch.float64 in (self.dtype, self.other):
            return "it computes in float32 and does not take float64"
        return None


class GaussianCall:
    """weight_b h(s_b), reduced: the arguments of :func:`fdu_kernels.gaussian_divergence`."""

    SCHEMA = (
        "Tensor pred, Tensor target, float[] numbers, Tensor? symbolic, Tensor? table, Tensor? sigma, Tensor? weight, "
        "Tensor? mask, bool return_distance, str distance, str reduction, Tensor? grad_scale"
    )
    """The arguments that ``flat`` returns and ``of`` takes. numbers: c, k, linear_beyond, sigma, grad_scale, where
    they are numbers. symbolic: the same as a tensor on the CPU, where compiled code has no constants for them."""
    __slots__ = (
        "distance", "grad_scale", "mask", "plain", "pred", "profile", "reduction", "return_distance", "s", "sigma",
        "target", "weight",
    )  # fmt: skip
    s: Tensor | None
    """Where the kernels write s [B], a constant, if ``return_distance`` asks for it: float64, or as devices have it."""

    def __init__(
        self, pred: Tensor, target: Tensor, profile: GaussianProfile, sigma: float | Tensor = 1.0,
        weight: Tensor | None = None, mask: Tensor | None = None, distance: str = "mean", reduction: str = "mean",
        grad_scale: float | Tensor = 1.0, return_distance: bool = False,
    ) -> None:  # fmt: skip
        self.pred, self.target, self.profile = pred, target, profile
        self.sigma, self.weight, self.mask = sigma, weight, mask
        self.distance, self.reduction, self.grad_scale = distance, reduction, grad_scale
        self.return_distance, self.s = return_distance, None
        self.plain = False

    @staticmethod
    def of(*flat: Any) -> GaussianCall:
        """The call whose ``flat`` form this is, with room for s."""
        pred, target, numbers, symbolic, table, sigma, weight, mask, wants_s, distance, reduction, grad_scale = flat
        c, k, linear_beyond, number, scale = numbers if symbolic is None else symbolic.tolist()
        profile = GaussianProfile(c, k, linear_beyond or math.inf, table)
        deviation, scale = number if sigma is None else sigma, scale if grad_scale is None else grad_scale
        call = GaussianCall(pred, target, profile, deviation, weight, mask, distance, reduction, scale, wants_s)
        call.s = call.room() if wants_s else None
        return call

    def flat(self) -> tuple[Any, ...]:
        """The arguments of an op."""
        h, (number, sigma), (scale, grad_scale) = self.profile, _split(self.sigma), _split(self.grad_scale)
        numbers = [h.c, h.k, _finite(h.linear_beyond), number, scale]
        return (
            self.pred, self.target, *_constant_or_not(numbers), h.table, sigma, self.weight, self.mask,
            self.return_distance, self.distance, self.reduction, grad_scale,
        )  # fmt: skip

    def room(self) -> Tensor:
        """Memory for s."""
        return self.pred.new_empty(self.pred.shape[:1], dtype=widest_dtype(self.pred.device))

    def note(self, s: Tensor) -> None:
        """Keep s, where it is asked for and no kernel writes it."""
        if self.return_distance:
            self.s = s.detach().to(widest_dtype(s.device))

    def checked(self, grad_out: Tensor | None = None) -> GaussianCall:
        """Raise for what no backend may get; itself, with its constants outside autograd and in real memory."""
        pred = self.pred
        checks.check_floating("pred", pred)
        checks.check_floating("target", self.target)
        checks.check_same("pred", pred, "target", self.target)
        checks.check_batch("pred", pred)
        checks.check_sigma(self.sigma, pred)
        if self.mask is not None:
            checks.check_mask(self.mask, pred)
        if self.weight is not None:
            checks.check_weight(self.weight, pred)
        checks.check_choice("distance", self.distance, DISTANCES)
        checks.check_choice("reduction", self.reduction, REDUCTIONS)
        checks.check_grad_scale(self.grad_scale)
        self.plain = is_plain(pred)
        if grad_out is not None:
            few = self.mask is None and self.weight is None and type(self.sigma) is float
            others = () if few else (("mask", self.mask), ("weight", self.weight), ("sigma", self.sigma))
            checks.check_grad_out(grad_out, (("pred", pred), ("target", self.target), *others), self.plain)
        fixed = in_memory if self.plain else _outside_autograd
        self.target, self.weight, self.mask = fixed(self.target), fixed(self.weight), fixed(self.mask)
        self.pred = in_memory(pred) if self.plain else pred
        if self.return_distance and self.plain:
            self.s = self.room()
        return self

    def kind(self) -> tuple[torch.device, torch.dtype, torch.dtype, str]:
        """The fields of a Kind; a tuple, because it is made at every call."""
        pred = self.pred
        return pred.device, pred.dtype, self.target.dtype, "exponential" if self.profile.table is None else "table"

    @property
    def accumulation(self) -> torch.dtype:
        """The dtype of sums and values."""
        return checks.accumulation_dtype(self.pred.dtype, self.target.dtype)

    @property
    def divisor(self) -> float:
        """The divisor of a mean of losses; 1 for other reductions."""
        return float(self.pred.shape[0]) if self.reduction == "mean" else 1.0


class ExpectationCall:
    """y(v) times weight [B] or mask, reduced: a density-ratio estimate, or one of the variational bound's two terms.

    A mean divides by the number of elements, or by the sum of the mask over all elements (0 gives 0).
    """

    SCHEMA = "Tensor v, float[] function, Tensor? weight, Tensor? mask, str reduction, float number, Tensor? grad_scale"
    """The arguments that ``flat`` returns and ``of`` takes. function: an ElementFunction's numbers; number:
    grad_scale, if one."""
    __slots__ = ("function", "grad_scale", "mask", "plain", "reduction", "v", "weight")

    def __init__(
        self, v: Tensor, function: Function, weight: Tensor | None = None, mask: Tensor | None = None,
        reduction: str = "mean", grad_scale: float | Tensor = 1.0,
    ) -> None:  # fmt: skip
        self.v, self.function = v, function
        self.weight, self.mask = weight, mask
        self.reduction, self.grad_scale = reduction, grad_scale
        self.plain = False

    @staticmethod
    def of(*flat: Any) -> ExpectationCall:
        """The call whose ``flat`` form this is."""
        v, function, weight, mask, reduction, number, grad_scale = flat
        scale = number if grad_scale is None else grad_scale
        made = ElementFunction.of((function[0] or math.inf, *function[1:]))
        return ExpectationCall(v, made, weight, mask, reduction, scale)

    def flat(self) -> tuple[Any, ...]:
        """The arguments of an op."""
        limit, *others = self.function.numbers or ()
        return self.v, [_finite(limit), *others], self.weight, self.mask, self.reduction, *_split(self.grad_scale)

    def checked(self, name: str) -> ExpectationCall:
        """Raise for what no backend may get; itself, with its constants in real memory. ``name``: what v is called."""
        checks.check_choice("reduction", self.reduction, REDUCTIONS)
        checks.check_floating(name, self.v)
        if name == "log_ratio":
            checks.check_batch(name, self.v)
        if self.weight is not None:
            checks.check_weight(self.weight, self.v, name)
        if self.mask is not None:
            checks.check_mask(self.mask, self.v, name)
        checks.check_grad_scale(self.grad_scale)
        self.plain = is_plain(self.v)
        fixed = in_memory if self.plain else _outside_autograd
        self.weight, self.mask = fixed(self.weight), fixed(self.mask)
        self.v = in_memory(self.v) if self.plain else self.v
        return self

    def kind(self) -> tuple[torch.device, torch.dtype, torch.dtype, str]:
        """As in GaussianCall."""
        v = self.v
        return v.device, v.dtype, v.dtype, "python" if self.function.numbers is None else "critic"

    @property
    def accumulation(self) -> torch.dtype:
        """The dtype of sums and values."""
        return checks.accumulation_dtype(self.v.dtype)


def in_memory(tensor: Any) -> Any:
    """The tensor without a negative bit, which its pointer does not show; the imaginary part of a conjugate has one."""
    return tensor if tensor is None or not tensor.is_neg() else tensor.resolve_neg()


def _outside_autograd(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach()


def _split(number: float | Tensor) -> tuple[float, Tensor | None]:
    return (1.0, number.detach()) if isinstance(number, Tensor) else (number * 1.0, None)


def _finite(limit: float) -> float:
    """0 stands for no limit: packages of AOTInductor cannot hold infinity."""
    return 0.0 if limit == math.inf else limit


def _constant_or_not(numbers: list[float]) -> tuple[list[float], Tensor | None]:
    """Numbers as they are; or as a tensor, where compiled code has symbols for them: an op's are guarded."""
    if not torch.compiler.is_compiling() or are_constants(numbers):
        return numbers, None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return [], torch.stack([one * number for number in numbers])
