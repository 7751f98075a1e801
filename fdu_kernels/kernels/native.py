"""The native backends: the kernels of csrc/, compiled C++ for the CPU and CUDA C++ for NVIDIA GPUs.

Built with the distribution, or at first use where that was not possible (:mod:`fdu_kernels.build`).
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable

import torch
from torch import Tensor

from fdu_kernels import build
from fdu_kernels.calls import ExpectationCall, GaussianCall, Kind

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
# To be like one of these costs half of stating dtype and device, which torch.set_default_device would decide otherwise.
_NUMBER, _NUMBER64 = (torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64))


class _Native:
    """A backend of the compiled module; see :class:`fdu_kernels.registry.Backend`."""

    @functools.cached_property
    def _compiled(self) -> types.ModuleType:
        """The compiled module; a BuildError, which is a RuntimeError, says why there is none."""
        return build.load()

    def why_unavailable(self) -> str | None:
        """Why it cannot run here, and what mends it. The first call may build the module."""
        return self._reason

    @functools.cached_property
    def _reason(self) -> str | None:
        raise NotImplementedError


class CpuBackend(_Native):
    """The kernels for the CPU."""

    FUSES_FORWARD = True

    @functools.cached_property
    def _reason(self) -> str | None:
        try:
            self._compiled  # noqa: B018
        except RuntimeError as error:
            return str(error)
        return None

    def why_unsuitable(self, kind: Kind) -> str | None:
        """Why it cannot take calls of this kind."""
        if kind.device.type != "cpu":
            return f"it computes on the CPU, and the tensor is on {kind.device}"
        return kind.why_not_fused(float64=True)

    def gaussian_forward(self, call: GaussianCall) -> tuple[Tensor, Tensor]:
        """See :class:`fdu_kernels.registry.Backend`."""
        losses = self._losses(call)
        coefficient = torch.empty_like(losses)
        self._gaussian(call, 0, 1.0, losses, coefficient, None)
        return losses, coefficient

    def gaussian_backward(self, call: GaussianCall, coefficient: Tensor) -> Tensor:
        """See :class:`fdu_kernels.registry.Backend`."""
        grad = torch.empty_like(call.pred)
        self._compiled.gaussian_backward(call.pred, call.target, call.mask, coefficient, grad)
        return grad

    def gaussian_value_and_grad(self, call: GaussianCall, grad_out: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`fdu_kernels.registry.Backend`."""
        value = self._losses(call) if call.reduction == "none" else torch.empty_like(_number(call.accumulation))
        grad = torch.empty_like(call.pred) if grad_out is None else grad_out
        self._gaussian(call, _REDUCTIONS[call.reduction], call.grad_scale, value, None, grad)
        return value, grad

    def _gaussian(
        self, call: GaussianCall, reduction: int, scale: float | Tensor, value: Tensor, *outputs: Tensor | None
    ) -> None:
        profile = call.profile
        self._compiled.gaussian(
            call.pred, call.target, profile.c, profile.k, profile.linear_beyond, profile.table, call.sigma, call.weight,
            call.mask, call.distance == "mean", reduction, scale, value, *outputs,
        )  # fmt: skip

    @staticmethod
    def _losses(call: GaussianCall) -> Tensor:
        return _number(call.accumulation).new_empty(call.pred.shape[:1])

    def expectation_forward(self, call: ExpectationCall) -> Tensor:
        """See :class:`fdu_kernels.registry.Backend`."""
        value = _value(call)
        self._expectation(call, 1.0, None, value, None)
        return value

    def expectation_backward(self, call: ExpectationCall, upstream: Tensor) -> Tensor:
        """See :class:`fdu_kernels.registry.Backend`."""
        grad = torch.empty_like(call.v)
        scale, elementwise = (1.0, upstream) if call.reduction == "none" else (upstream, None)
        self._expectation(call, scale, elementwise, None, grad)
        return grad

    def expectation_value_and_grad(self, call: ExpectationCall) -> tuple[Tensor, Tensor]:
        """See :class:`fdu_kernels.registry.Backend`."""
        value, grad = _value(call), torch.empty_like(call.v)
        self._expectation(call, call.grad_scale, None, value, grad)
        return value, grad

    def _expectation(self, call: ExpectationCall, scale: float | Tensor, *tensors: Tensor | None) -> None:
        self._compiled.expectation(
            call.v, call.function.numbers, call.weight, call.mask, _REDUCTIONS[call.reduction], scale, *tensors
        )


class CudaBackend(_Native):
    """The kernels for CUDA devices.

    They return before the device has done its work. Partial sums have a workspace of torch, so that a call can be
    captured in a graph.
    """

    FUSES_FORWARD = False

    @functools.cached_property
    def _reason(self) -> str | None:
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        if not torch.cuda.is_available():
            return "no CUDA device"
        try:
            module = self._compiled
        except RuntimeError as error:
            return str(error)
        if not hasattr(module, "cuda_gaussian"):
            return f"built without CUDA kernels: {json.loads(module.BUILD)['cuda']}"
        reasons = [self._why_unusable(index) for index in range(torch.cuda.device_count())]
        return None if None in reasons else reasons[0]

    def why_unsuitable(self, kind: Kind) -> str | None:
        """Why it cannot take calls of this kind."""
        if reason := kind.why_not_fused():
            return reason
        if kind.device.type != "cuda":
            return f"it computes on CUDA devices, and the tensor is on {kind.device}"
        return self._why_unusable(torch.cuda.current_device() if kind.device.index is None else kind.device.index)

    @functools.cache  # noqa: B019 - as many entries as devices, for an object that lives as long as the process
    def _why_unusable(self, index: int) -> str | None:
        with torch.cuda.device(index):
            reason: str = self._compiled.cuda_why_unusable(index)
        if not reason:
            return None
        capability = "".join(map(str, torch.cuda.get_device_capability(index)))
        built = json.loads(self._compiled.BUILD)["cuda"]
        return f"cuda:{index} (sm_{capability}) cannot run the CUDA kernels, built {built}: {reason}"

    def gaussian_forward(self, call: GaussianCall) -> tuple[Tensor, Tensor]:
        """See :class:`fdu_kernels.registry.Backend`. One launch."""
        losses, coefficient = (call.pred.new_empty(call.pred.shape[:1], dtype=torch.float32) for _ in range(2))
        self._gaussian(call, "none", 1.0, losses, coefficient, None)
        return losses, coefficient

    def gaussian_backward(self, call: GaussianCall, coefficient: Tensor) -> Tensor:
        """See :class:`fdu_kernels.registry.Backend`. One launch."""
        grad = torch.empty_like(call.pred)

        def launch(pred: Tensor, target: Tensor, mask: Tensor | None, grad: Tensor) -> bool:
            return self._call("cuda_gaussian_backward", pred.device, pred, target, mask, coefficient, grad)

        _run(launch, (call.pred, call.target, call.mask), (grad,))
        return grad

    def gaussian_value_and_grad(self, call: GaussianCall, grad_out: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`fdu_kernels.registry.Backend`. One launch where a sample fits on chip, else two."""
        grad = torch.empty_like(call.pred) if grad_out is None else grad_out
        value = call.pred.new_empty(call.pred.shape[:1] if call.reduction == "none" else (), dtype=torch.float32)
        self._gaussian(call, call.reduction, call.grad_scale, value, None, grad)
        return value, grad

    def _gaussian(
        self,
        call: GaussianCall,
        reduction: str,
        scale: float | Tensor,
        value: Tensor,
        coefficient: Tensor | None,
        grad: Tensor | None,
    ) -> None:
        profile, device = call.profile, call.pred.device
        scale = number_on(scale, device)

        def launch(pred: Tensor, target: Tensor, mask: Tensor | None, *outputs: Tensor | None) -> bool:
            return self._call(
                "cuda_gaussian", device, pred, target, profile.c, profile.k, profile.linear_beyond,
                profile.table_on(device), call.sigma, call.weight, mask, call.distance == "mean", _REDUCTIONS[reduction],
                scale, *outputs, self._workspace(pred, len(pred)),
            )  # fmt: skip

        _run(launch, (call.pred, call.target, call.mask), (value, coefficient, grad))

    def expectation_forward(self, call: ExpectationCall) -> Tensor:
        """See :class:`fdu_kernels.registry.Backend`. One launch, beside that for the sum of a mask."""
        value = _value(call)
        self._expectation(call, 1.0, None, value, None)
        return value

    def expectation_backward(self, call: ExpectationCall, upstream: Tensor) -> Tensor:
        """See :class:`fdu_kernels.registry.Backend`. Launches as there."""
        grad = torch.empty_like(call.v)
        scale, elementwise = (1.0, upstream) if call.reduction == "none" else (upstream, None)
        self._expectation(call, scale, elementwise, None, grad)
        return grad

    def expectation_value_and_grad(self, call: ExpectationCall) -> tuple[Tensor, Tensor]:
        """See :class:`fdu_kernels.registry.Backend`. Launches as there."""
        value, grad = _value(call), torch.empty_like(call.v)
        self._expectation(call, call.grad_scale, None, value, grad)
        return value, grad

    def _expectation(
        self,
        call: ExpectationCall,
        scale: float | Tensor,
        upstream: Tensor | None,
        value: Tensor | None,
        grad: Tensor | None,
    ) -> None:
        device, scale = call.v.device, number_on(scale, call.v.device)

        def launch(v: Tensor, mask: Tensor | None, upstream: Tensor | None, *outputs: Tensor | None) -> bool:
            # The mask's sum, of the mask as the kernel gets it, before the first element of a gradient is written.
            total = None if mask is None or call.reduction != "mean" else mask.sum(dtype=torch.float32)
            return self._call(
                "cuda_expectation", device, v, call.function.numbers, call.weight, mask, total,
                _REDUCTIONS[call.reduction], scale, upstream, *outputs, self._workspace(v, 0),
            )  # fmt: skip

        _run(launch, (call.v, call.mask, upstream), (value, grad))

    def _call(self, operation: str, device: torch.device, *arguments: object) -> bool:
        # By torch, whose runtime is not the one that the module was linked with.
        if device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self._call(operation, device, *arguments)
        launched: bool = getattr(self._compiled, operation)(*arguments)
        return launched

    def _workspace(self, tensor: Tensor, batch: int) -> Tensor:
        once, each = self._compiled.CUDA_WORKSPACE
        return tensor.new_empty(once + each * batch, dtype=torch.uint8)


def _run(
    launch: Callable[..., bool], inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]
) -> None:
    """Launch; on copies in one order of memory, where the kernels cannot walk over the tensors as they are."""
    if launch(*inputs, *outputs):
        return
    first = inputs[0]
    assert first is not None
    copies = [None if tensor is None else _contiguous(tensor.expand(first.shape)) for tensor in inputs]
    made = [
        None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in outputs
    ]
    launch(*copies, *made)
    for tensor, computed in zip(outputs, made, strict=True):
        if tensor is not None and computed is not None:
            tensor.copy_(computed)


def _contiguous(tensor: Tensor) -> Tensor:
    # Only masks may be float64.
    return (tensor.float() if tensor.dtype is torch.float64 else tensor).contiguous()


def _value(call: ExpectationCall) -> Tensor:
    if call.reduction == "none":
        return torch.empty_like(call.v, dtype=call.accumulation)
    return torch.empty((), dtype=call.accumulation, device=call.v.device)


def _number(dtype: torch.dtype) -> Tensor:
    return _NUMBER64 if dtype is torch.float64 else _NUMBER


def number_on(number: float | Tensor, device: torch.device) -> float | Tensor:
    """A tensor on another device than the kernels' is one on the CPU: reading it makes nobody wait."""
    return number if not isinstance(number, Tensor) or number.device == device else float(number)


cpu = CpuBackend()
"""The backend "cpu"."""
cuda = CudaBackend()
"""The backend "cuda"."""
