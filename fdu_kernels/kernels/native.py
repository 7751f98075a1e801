"""The native backends: the kernels of csrc/, compiled C++ for the CPU and CUDA C++ for NVIDIA GPUs.

Built with the distribution, or at first use where that was not possible (:mod:`fdu_kernels.build`).
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fdu_kernels import build
from fdu_kernels.calls import ExpectationCall, GaussianCall, Kind
from fdu_kernels.internals import on_the_cpu

Number = float | Tensor
Output = Tensor | None

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
# To be like one of these costs half of stating dtype and device, which torch.set_default_device would decide otherwise.
with on_the_cpu():  # whatever mode the first call is made in
    _NUMBERS = {dtype: torch.zeros((), dtype=dtype) for dtype in (torch.float32, torch.float64)}


class CpuBackend:
    """The kernels for the CPU; :class:`fdu_kernels.registry.Backend` says what the functions do."""

    FUSES_FORWARD = True

    @functools.cached_property
    def _compiled(self) -> types.ModuleType:
        """The compiled module; a BuildError, which is a RuntimeError, says why there is none."""
        return build.load()

    @functools.cached_property
    def _reason(self) -> str | None:
        try:
            self._compiled  # noqa: B018
        except RuntimeError as error:
            return str(error)
        return None

    def why_unavailable(self) -> str | None:
        return self._reason

    def why_unsuitable(self, kind: Kind) -> str | None:
        if kind.device.type != "cpu":
            return f"it computes on the CPU, and the tensor is on {kind.device}"
        return kind.why_not_fused(float64=True)

    def gaussian_forward(self, call: GaussianCall) -> tuple[Tensor, Tensor]:
        losses = self._losses(call)
        coefficient = torch.empty_like(losses)
        self._gaussian(call, "none", 1.0, losses, coefficient, None)
        return losses, coefficient

    def gaussian_backward(self, call: GaussianCall, coefficient: Tensor) -> Tensor:
        grad = torch.empty_like(call.pred)
        self._compiled.gaussian_backward(call.pred, call.target, call.mask, coefficient, grad)
        return grad

    def gaussian_value_and_grad(self, call: GaussianCall, grad_out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value = self._losses(call) if call.reduction == "none" else self._total(call)
        grad = torch.empty_like(call.pred) if grad_out is None else grad_out
        self._gaussian(call, call.reduction, call.grad_scale, value, None, grad)
        return value, grad

    def expectation_forward(self, call: ExpectationCall) -> Tensor:
        value = self._terms(call)
        self._expectation(call, 1.0, None, value, None)
        return value

    def expectation_backward(self, call: ExpectationCall, upstream: Tensor) -> Tensor:
        grad = torch.empty_like(call.v)
        scale, elementwise = (1.0, upstream) if call.reduction == "none" else (upstream, None)
        self._expectation(call, scale, elementwise, None, grad)
        return grad

    def expectation_value_and_grad(self, call: ExpectationCall) -> tuple[Tensor, Tensor]:
        value, grad = self._terms(call), torch.empty_like(call.v)
        self._expectation(call, call.grad_scale, None, value, grad)
        return value, grad

    def _losses(self, call: GaussianCall) -> Tensor:
        return _NUMBERS[call.accumulation].new_empty(call.pred.shape[:1])

    def _total(self, call: GaussianCall | ExpectationCall) -> Tensor:
        return torch.empty_like(_NUMBERS[call.accumulation])

    def _terms(self, call: ExpectationCall) -> Tensor:
        return torch.empty_like(call.v, dtype=call.accumulation) if call.reduction == "none" else self._total(call)

    def _gaussian(self, call: GaussianCall, reduction: str, scale: Number, value: Tensor, *outputs: Output) -> None:
        h = call.profile
        self._compiled.gaussian(
            call.pred, call.target, h.c, h.k, h.linear_beyond, h.table, call.sigma, call.weight, call.mask,
            call.distance == "mean", _REDUCTIONS[reduction], scale, value, *outputs, call.s,
        )  # fmt: skip

    def _expectation(self, call: ExpectationCall, scale: Number, upstream: Tensor | None, *outputs: Output) -> None:
        numbers, reduction = call.function.numbers, _REDUCTIONS[call.reduction]
        self._compiled.expectation(call.v, numbers, call.weight, call.mask, reduction, scale, upstream, *outputs)


class CudaBackend(CpuBackend):
    """The kernels for CUDA devices.

    They return before the device has done its work, and can be captured in a graph. A Gaussian value and gradient is
    one launch where a sample fits on chip, else two; anything else is one, plus one for the sum of a mask.
    """

    FUSES_FORWARD = False

    def is_built(self) -> bool:
        """Whether there is a device, and its kernels need no build."""
        return torch.version.cuda is not None and build.is_built(build.architectures_of_devices())

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

    def _losses(self, call: GaussianCall) -> Tensor:
        return call.pred.new_empty(call.pred.shape[:1], dtype=torch.float32)

    def _total(self, call: GaussianCall | ExpectationCall) -> Tensor:
        tensor = call.pred if isinstance(call, GaussianCall) else call.v
        return tensor.new_empty((), dtype=torch.float32)

    def _gaussian(self, call: GaussianCall, reduction: str, scale: Number, value: Tensor, *outputs: Output) -> None:
        h, device, scale = call.profile, call.pred.device, _number_on(scale, call.pred.device)
        coefficient, grad = outputs

        def launch(pred: Tensor, target: Tensor, mask: Tensor | None, grad: Tensor | None) -> bool:
            return self._call(
                "cuda_gaussian", device, pred, target, h.c, h.k, h.linear_beyond, h.table_on(device), call.sigma,
                call.weight, mask, call.distance == "mean", _REDUCTIONS[reduction], scale, value, coefficient, grad,
                call.s, self._workspace(pred, len(pred)),
            )  # fmt: skip

        _run(launch, (call.pred, call.target, call.mask), (grad,))

    def gaussian_backward(self, call: GaussianCall, coefficient: Tensor) -> Tensor:
        def launch(pred: Tensor, target: Tensor, mask: Tensor | None, grad: Tensor) -> bool:
            return self._call("cuda_gaussian_backward", pred.device, pred, target, mask, coefficient, grad)

        grad = torch.empty_like(call.pred)
        _run(launch, (call.pred, call.target, call.mask), (grad,))
        return grad

    def _expectation(self, call: ExpectationCall, scale: Number, upstream: Tensor | None, *outputs: Output) -> None:
        device, scale, (value, grad) = call.v.device, _number_on(scale, call.v.device), outputs
        elementwise = call.reduction == "none"
        factor = call.mask if call.weight is None else call.weight.reshape(-1, *[1] * (call.v.ndim - 1))

        def launch(v: Tensor, factor: Tensor | None, upstream: Tensor | None, *outputs: Tensor | None) -> bool:
            # The mask's sum, of the mask as the kernel gets it, before the first element of a gradient is written.
            masked = factor if call.mask is not None and call.reduction == "mean" else None
            total = None if masked is None else masked.sum(dtype=torch.float32)
            terms, grad = outputs
            return self._call(
                "cuda_expectation", device, v, call.function.numbers, factor, total, _REDUCTIONS[call.reduction],
                scale, upstream, terms if elementwise else value, grad, self._workspace(v, 0),
            )  # fmt: skip

        _run(launch, (call.v, factor, upstream), (value if elementwise else None, grad))

    def _call(self, operation: str, device: torch.device, *arguments: object) -> bool:
        # By torch, whose runtime is not the one that the module was linked with.
        if device.index != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                return self._call(operation, device, *arguments)
        return getattr(self._compiled, operation)(*arguments)

    def _workspace(self, tensor: Tensor, batch: int) -> Tensor:
        once, each = self._compiled.CUDA_WORKSPACE
        return tensor.new_empty(once + each * batch, dtype=torch.uint8)


def _run(launch: Callable[..., bool], read: Sequence[Tensor | None], written: Sequence[Tensor | None]) -> None:
    """Launch; with copies in one order of memory where the kernels do not take the tensors as they are."""
    if launch(*read, *written):
        return
    assert read[0] is not None
    # That of the first tensor, where its samples follow each other.
    order = torch.empty_like(read[0], device="meta")
    if order.ndim and order.stride(0) * len(order) < order.numel():
        order = torch.empty_like(order, memory_format=torch.contiguous_format)

    def lying_so(tensor: Tensor | None, copied: bool) -> Tensor | None:
        if tensor is None:
            return None
        taken = tensor.data_ptr() % 16 == 0 and tensor.dtype is not torch.float64  # masks may be
        if taken and (tensor.shape, tensor.stride()) == (order.shape, order.stride()):
            return tensor
        dtype = torch.float32 if tensor.dtype is torch.float64 else tensor.dtype
        room = torch.empty_like(order, dtype=dtype, device=tensor.device)
        return room.copy_(tensor.detach()) if copied else room

    filled = [lying_so(tensor, False) for tensor in written]
    if not launch(*(lying_so(tensor, True) for tensor in read), *filled):
        raise RuntimeError("fdu_kernels: the CUDA kernels do not take these tensors, nor copies of them")
    for tensor, computed in zip(written, filled, strict=True):
        if tensor is not None and computed is not None and computed is not tensor:
            tensor.copy_(computed)


def _number_on(number: Number, device: torch.device) -> Number:
    """A tensor on another device than the kernels' is one on the CPU: reading it makes nobody wait."""
    return number if not isinstance(number, Tensor) or number.device == device else float(number)


cpu = CpuBackend()
cuda = CudaBackend()
