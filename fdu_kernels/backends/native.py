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

from fdu_kernels.lowering import ElementFunction, GaussianProfile

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
# To be like one of these costs half of stating dtype and device, which torch.set_default_device would decide otherwise.
_NUMBER, _NUMBER64 = (torch.zeros((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64))


class _Native:
    """The compiled module; a BuildError, which is a RuntimeError, says why there is none."""

    @functools.cached_property
    def _compiled(self) -> types.ModuleType:
        from fdu_kernels import build  # here, so that python -m fdu_kernels.build finds it not yet imported

        return build.load()


class CpuKernels(_Native):
    """The kernels for the CPU; see :class:`fdu_kernels.backends.kernels.Kernels`."""

    FUSES_FORWARD = True

    @functools.cached_property
    def _reason(self) -> str | None:
        try:
            self._compiled  # noqa: B018
        except RuntimeError as error:
            return str(error)
        return None

    def why_unavailable(self) -> str | None:
        """Why there is no compiled module, and what mends it. The first call may build it."""
        return self._reason

    def why_unsuitable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot take tensors of this kind."""
        if device.type != "cpu":
            return f"it computes on the CPU, and the tensor is on {device}"
        return None if dtype in _DTYPES else f"it has no kernels for {dtype}"

    def gaussian_forward(
        self,
        pred: Tensor,
        target: Tensor,
        profile: GaussianProfile,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
    ) -> tuple[Tensor, Tensor]:
        """weight h(s) and 2 weight h'(s) / (sigma^2 Z)."""
        loss = _per_sample(pred, target)
        coefficient = torch.empty_like(loss)
        self._compiled.gaussian(
            pred, target, profile.c, profile.k, profile.linear_beyond, profile.table, sigma, weight,
            mask, distance == "mean", 0, 1.0, loss, coefficient, None,
        )  # fmt: skip
        return loss, coefficient

    def gaussian_backward(self, pred: Tensor, target: Tensor, mask: Tensor | None, coefficient: Tensor) -> Tensor:
        """coefficient_b mask (pred - target)."""
        grad = torch.empty_like(pred)
        self._compiled.gaussian_backward(pred, target, mask, coefficient, grad)
        return grad

    def gaussian_value_and_grad(
        self,
        pred: Tensor,
        target: Tensor,
        profile: GaussianProfile,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
        reduction: str,
        grad_scale: float | Tensor,
        grad_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The reduced loss, and the gradient of its sum times grad_scale."""
        value = _per_sample(pred, target) if reduction == "none" else _accumulated(pred, target)
        grad = torch.empty_like(pred) if grad_out is None else grad_out
        self._compiled.gaussian(
            pred, target, profile.c, profile.k, profile.linear_beyond, profile.table, sigma, weight,
            mask, distance == "mean", _REDUCTIONS[reduction], grad_scale, value, None, grad,
        )  # fmt: skip
        return value, grad

    def expectation(
        self, v: Tensor, function: ElementFunction, weight: Tensor | None, mask: Tensor | None, reduction: str
    ) -> Tensor:
        """y(v) times weight or mask, reduced."""
        value = _terms(v, reduction)
        self._compiled.expectation(v, function.numbers, weight, mask, _REDUCTIONS[reduction], 1.0, None, value, None)
        return value

    def expectation_backward(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        upstream: Tensor,
    ) -> Tensor:
        """The gradient of :meth:`expectation` in v."""
        grad = torch.empty_like(v)
        scale, elementwise = (1.0, upstream) if reduction == "none" else (upstream, None)
        self._compiled.expectation(
            v, function.numbers, weight, mask, _REDUCTIONS[reduction], scale, elementwise, None, grad
        )
        return grad

    def expectation_value_and_grad(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The value, and the gradient of its sum times grad_scale."""
        value, grad = _terms(v, reduction), torch.empty_like(v)
        self._compiled.expectation(
            v, function.numbers, weight, mask, _REDUCTIONS[reduction], grad_scale, None, value, grad
        )
        return value, grad


class CudaKernels(_Native):
    """The kernels for CUDA devices; see :class:`fdu_kernels.backends.kernels.Kernels`.

    They return before the device has done its work. Partial sums have a workspace of torch, so that a call can be
    captured in a graph. Tensors that do not lie as the kernels read them, which these say, are copied.
    """

    FUSES_FORWARD = False
    DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))

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

    def why_unavailable(self) -> str | None:
        """Why there is no device or no compiled module for it, and what mends it. The first call may build it."""
        return self._reason

    def why_unsuitable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot take tensors of this kind."""
        if dtype not in self.DTYPES:
            return f"it computes in float32 and does not take {str(dtype).removeprefix('torch.')}"
        if device.type != "cuda":
            return f"it computes on CUDA devices, and the tensor is on {device}"
        return self._why_unusable(torch.cuda.current_device() if device.index is None else device.index)

    @functools.cache  # noqa: B019 - as many entries as devices, for an object that lives as long as the process
    def _why_unusable(self, index: int) -> str | None:
        with torch.cuda.device(index):
            reason: str = self._compiled.cuda_why_unusable(index)
        if not reason:
            return None
        capability = "".join(map(str, torch.cuda.get_device_capability(index)))
        built = json.loads(self._compiled.BUILD)["cuda"]
        return f"cuda:{index} (sm_{capability}) cannot run the CUDA kernels, built {built}: {reason}"

    def gaussian_forward(
        self,
        pred: Tensor,
        target: Tensor,
        profile: GaussianProfile,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
    ) -> tuple[Tensor, Tensor]:
        """weight h(s) and 2 weight h'(s) / (sigma^2 Z). One launch."""
        loss, coefficient = (pred.new_empty(pred.shape[:1], dtype=torch.float32) for _ in range(2))
        self._gaussian(
            pred, target, profile, sigma, weight, mask, distance, "none", 1.0, loss, coefficient, None
        )  # fmt: skip
        return loss, coefficient

    def gaussian_backward(self, pred: Tensor, target: Tensor, mask: Tensor | None, coefficient: Tensor) -> Tensor:
        """coefficient_b mask (pred - target). One launch."""
        grad = torch.empty_like(pred)

        def call(pred: Tensor, target: Tensor, mask: Tensor | None, grad: Tensor | None) -> bool:
            return self._call("cuda_gaussian_backward", pred.device, pred, target, mask, coefficient, grad)

        _launch(call, (pred, target, mask), (grad,))
        return grad

    def gaussian_value_and_grad(
        self,
        pred: Tensor,
        target: Tensor,
        profile: GaussianProfile,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
        reduction: str,
        grad_scale: float | Tensor,
        grad_out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The reduced loss, and the gradient of its sum times grad_scale. One launch where a sample fits on chip, else
        two."""
        grad = torch.empty_like(pred) if grad_out is None else grad_out
        value = pred.new_empty(pred.shape[:1] if reduction == "none" else (), dtype=torch.float32)
        self._gaussian(
            pred, target, profile, sigma, weight, mask, distance, reduction, grad_scale, value, None, grad
        )  # fmt: skip
        return value, grad

    def expectation(
        self, v: Tensor, function: ElementFunction, weight: Tensor | None, mask: Tensor | None, reduction: str
    ) -> Tensor:
        """y(v) times weight or mask, reduced. One launch, beside that for the sum of a mask."""
        value = _values(v, reduction)
        self._expectation(v, function, weight, mask, reduction, 1.0, None, value, None)
        return value

    def expectation_backward(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        upstream: Tensor,
    ) -> Tensor:
        """The gradient of :meth:`expectation` in v. Launches as there."""
        grad = torch.empty_like(v)
        scale, elementwise = (1.0, upstream) if reduction == "none" else (upstream, None)
        self._expectation(v, function, weight, mask, reduction, scale, elementwise, None, grad)
        return grad

    def expectation_value_and_grad(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        grad_scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The value, and the gradient of its sum times grad_scale. Launches as there."""
        value, grad = _values(v, reduction), torch.empty_like(v)
        self._expectation(v, function, weight, mask, reduction, grad_scale, None, value, grad)
        return value, grad

    def _gaussian(
        self,
        pred: Tensor,
        target: Tensor,
        profile: GaussianProfile,
        sigma: float | Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        distance: str,
        reduction: str,
        grad_scale: float | Tensor,
        value: Tensor,
        coefficient: Tensor | None,
        grad: Tensor | None,
    ) -> None:
        scale, workspace = _on(grad_scale, pred.device), self._workspace(pred, len(pred))

        def call(pred: Tensor, target: Tensor, mask: Tensor | None, grad: Tensor | None) -> bool:
            return self._call(
                "cuda_gaussian", pred.device,
                pred, target, profile.c, profile.k, profile.linear_beyond, profile.table_on(pred.device), sigma, weight,
                mask, distance == "mean", _REDUCTIONS[reduction], scale, value, coefficient, grad, workspace,
            )  # fmt: skip

        _launch(call, (pred, target, mask), (grad,))

    def _expectation(
        self,
        v: Tensor,
        function: ElementFunction,
        weight: Tensor | None,
        mask: Tensor | None,
        reduction: str,
        grad_scale: float | Tensor,
        upstream: Tensor | None,
        value: Tensor | None,
        grad: Tensor | None,
    ) -> None:
        if weight is not None and weight.dtype is torch.float64:
            weight = weight.float()
        scale, workspace = _on(grad_scale, v.device), self._workspace(v, 0)

        def call(
            v: Tensor, mask: Tensor | None, upstream: Tensor | None, terms: Tensor | None, grad: Tensor | None
        ) -> bool:
            # The sum of the mask as the kernel gets it, before the first element of a gradient is written.
            total = mask.sum(dtype=torch.float32) if mask is not None and reduction == "mean" else None
            return self._call(
                "cuda_expectation", v.device,
                v, function.numbers, weight, mask, total, _REDUCTIONS[reduction], scale, upstream,
                value if terms is None else terms, grad, workspace,
            )  # fmt: skip

        _launch(call, (v, mask, upstream), (value if reduction == "none" else None, grad))

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


def _values(v: Tensor, reduction: str) -> Tensor:
    return torch.empty_like(v, dtype=torch.float32) if reduction == "none" else v.new_empty((), dtype=torch.float32)


def _on(number: float | Tensor, device: torch.device) -> float | Tensor:
    """A tensor on another device than the kernels' is one on the CPU: reading it makes nobody wait."""
    return number if not isinstance(number, Tensor) or number.device == device else float(number)


def _launch(call: Callable[..., bool], read: tuple[Tensor | None, ...], written: tuple[Tensor | None, ...]) -> None:
    """Call with what is read and then what is written: as it is, or, where the kernels do not take it so, with copies
    in one order of memory, that of the first where its samples follow each other."""
    if call(*read, *written):
        return
    assert read[0] is not None
    order = torch.empty_like(read[0], device="meta")
    if order.ndim and order.stride(0) * len(order) < order.numel():
        order = torch.empty_like(order, memory_format=torch.contiguous_format)
    copies = [
        tensor if tensor is None or _lies_as(tensor, order) else _room(tensor, order).copy_(tensor.detach())
        for tensor in read
    ]
    filled = [tensor if tensor is None or _lies_as(tensor, order) else _room(tensor, order) for tensor in written]
    if not call(*copies, *filled):
        raise RuntimeError("fdu_kernels: the CUDA kernels do not take these tensors, nor copies of them")
    for tensor, computed in zip(written, filled, strict=True):
        if tensor is not None and computed is not None and computed is not tensor:
            tensor.copy_(computed)


def _lies_as(tensor: Tensor, order: Tensor) -> bool:
    """Whether the kernels can read it with others in this order."""
    same = tensor.shape == order.shape and tensor.stride() == order.stride()
    return same and tensor.data_ptr() % 16 == 0 and tensor.dtype is not torch.float64


def _room(tensor: Tensor, order: Tensor) -> Tensor:
    """Of the dtype that the kernels can read it in."""
    dtype = torch.float32 if tensor.dtype is torch.float64 else tensor.dtype
    return torch.empty_like(order, dtype=dtype, device=tensor.device)


def _accumulated(*tensors: Tensor) -> Tensor:
    return torch.empty_like(_number(*tensors))


def _per_sample(*tensors: Tensor) -> Tensor:
    return _number(*tensors).new_empty(tensors[0].shape[:1])


def _number(*tensors: Tensor) -> Tensor:
    """Of the dtype in which sums of all of them are taken."""
    for tensor in tensors:
        if tensor.dtype is torch.float64:
            return _NUMBER64
    return _NUMBER


def _terms(v: Tensor, reduction: str) -> Tensor:
    if reduction != "none":
        return _accumulated(v)
    return torch.empty_like(v, dtype=torch.float64 if v.dtype is torch.float64 else torch.float32)


cpu = CpuKernels()
"""The backend "cpu"."""
cuda = CudaKernels()
"""The backend "cuda"."""
