"""The memory that an erasure needs, from the shapes of a model alone: nothing is downloaded, trained or even held."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from fdu.config import TRAIN_METHODS, EraseConfig
from fdu.models.denoiser import Conditioning, Denoiser
from fdu.models.offloading import blocks_of
from fdu.models.quantization import parameter_count
from fdu.storage.shapes import conditioning_shapes
from fdu.training.examples import batch_count, latent_counts
from fdu.training.frozen_layers import keeping_less
from fdu.training.loop import checkpointed
from fdu.training.methods import Request, attach

SHARE = 0.9
"""The share of a device's memory that an estimate may fill; its context and allocator take some more."""
LOOK_AGAIN = 1.01
"""A peak that is so many times the last one is a reason to look for cycles, which takes long."""
VALUES = object()
"""Stands for a tensor that has values."""
MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0, "prodigy": 16.0, "schedule_free": 8.0}
"""Bytes of an optimizer's state per trained parameter."""
HALVES = ((functional, "linear"), (functional, "conv2d"), (torch, "matmul"), (torch, "bmm"), (torch, "baddbmm"))
WHOLES = ((functional, "group_norm"), (functional, "layer_norm"), (functional, "softmax"))
"""What autocast computes in half precision, and in float32."""


def _attention_flops(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLOPS = {
    **flop_registry,
    _FLASH: shape_wrapper(_attention_flops),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flops),
}
"""What an operation costs, by operation; the attention that stands for every device's here is none of PyTorch's."""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes that an erasure needs on its device, without what a context of the device and its allocator add."""

    parameters: dict[str, int]
    """Parameters of each part of the pipeline, as a count."""
    trained: int
    """Trained parameters, as a count."""
    pipeline: int
    """What is there while prompts are read: all parts of the pipeline, or the denoiser alone if it is offloaded."""
    denoiser: int
    """The denoiser alone; the other parts are on the CPU while it draws latents and trains."""
    states: int
    """Trained parameters in float32, their gradients and the optimizer's state."""
    step: int
    """The largest sum of activations in a training step."""
    sampling: int
    """The largest sum of activations while latents are drawn."""
    flops: int
    """Floating-point operations of a training step, counting a multiplication and an addition as two."""
    preparation: int
    """Floating-point operations before the first step: latents are drawn, and frozen_batches predicted."""
    blocks: tuple[int, ...] = ()
    """Bytes of each block of the denoiser that can be offloaded, the largest first."""

    @property
    def training(self) -> int:
        """What a training step needs."""
        return self.denoiser + self.states + self.step

    @property
    def peak(self) -> int:
        """The most that is needed at any time."""
        return max(self.pipeline, self.denoiser + self.sampling, self.training)

    def with_optimizer(self, optimizer: str) -> Footprint:
        """The memory of the same erasure with another optimizer."""
        # Trained parameters and their gradients in float32, and the optimizer's state.
        return dataclasses.replace(self, states=int(self.trained * (8 + MOMENTS[optimizer])))

    def offloaded(self) -> Footprint:
        """The memory of the same erasure while the blocks of the denoiser and the other parts stay on the CPU.

        Raises:
            ValueError: the denoiser has no blocks that can.
        """
        if not self.blocks:
            raise ValueError("offload serves transformers, and the denoiser is none; leave it out")
        # Besides a block, the graph may still hold the one before it. The other parts do not come to the device.
        denoiser = self.denoiser - sum(self.blocks[2:])
        return dataclasses.replace(self, denoiser=denoiser, pipeline=denoiser)


def check_estimable(config: EraseConfig) -> None:
    """Refuse settings that are not by steps, or that change the memory in ways unknown here.

    Raises:
        ValueError: names the setting.
    """
    if not TRAIN_METHODS[config.train_method].trains:
        raise ValueError(f"train_method {config.train_method!r} trains nothing; choose one with steps")
    for name in ("variational", "shard", "compile", "adversarial_rounds", "gradient_surgery"):
        if getattr(config, name):
            raise ValueError(f"{name} is not part of the estimate; leave it out")
    if config.objective != "model":
        raise ValueError(f"objective {config.objective!r} is not part of the estimate; leave it out")


class Estimator:
    """Estimates the memory of erasures from one model. Settings that change no tensor of a step share its trace."""

    def __init__(self, shapes: Callable[[EraseConfig, str], Denoiser]) -> None:
        """``shapes``: of a model, with these settings and this quantization, as :func:`footprint` takes them."""
        self.shapes = shapes
        self.found: dict[str, Footprint] = {}

    def __call__(self, config: EraseConfig, quantization: str = "none", offload: bool = False) -> Footprint:
        """The memory of an erasure; see :func:`footprint`."""
        traced = dataclasses.replace(config, optimizer="adamw")
        key = f"{quantization} {traced.as_dict()}"
        if key not in self.found:
            self.found[key] = footprint(self.shapes(traced, quantization), traced)
        found = self.found[key].with_optimizer(config.optimizer)
        return found.offloaded() if offload else found


def footprint(denoiser: Denoiser, config: EraseConfig) -> Footprint:
    """The memory of an erasure with these settings.

    Args:
        denoiser: of a pipeline of shapes alone, from :func:`fdu.storage.shapes.load_shapes`.
        config: the settings.

    Raises:
        ValueError: as :func:`check_estimable`, or a family that cannot read prompts by their shapes.
    """
    check_estimable(config)
    parts = {name: part for name, part in denoiser.pipeline.components.items() if isinstance(part, nn.Module)}
    sizes = {name: _size(part) for name, part in parts.items()}
    counts = {name: parameter_count(part) for name, part in parts.items()}
    blocks = blocks_of(denoiser.module) if denoiser.module_name == "transformer" else []
    block_sizes = sorted(map(_size, blocks), reverse=True)
    request = Request(
        config.train_method,
        config.rank,
        config.lora_alpha,
        target_names=("a",),
        prompts=("a",),
        adapter_layers=config.adapter_layers,
        by_shape=True,
    )
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)
    with torch.device("meta"), _as_on_a_device(half):
        trainable = attach(denoiser, request)
        count = sum(parameter.numel() for parameter in trainable.named_parameters().values())
        try:
            with keeping_less(denoiser.module), checkpointed(denoiser.module, config.gradient_checkpointing):
                step, sampling, flops, preparation = _step(denoiser, trainable, config)
        except RuntimeError as error:
            raise ValueError(
                f"the estimate sees shapes alone, and the pipeline of {denoiser.family} looks at values of its prompts "
                f"where they train; fdu plan does not serve train_method {config.train_method!r} for it"
            ) from error
        finally:
            trainable.remove()
    kept = sum(size for name, size in sizes.items() if trainable.trains_text and name in denoiser.text_encoders)
    return Footprint(
        parameters=counts,
        trained=count,
        pipeline=sum(sizes.values()),
        denoiser=sizes[denoiser.module_name] + kept,
        states=0,
        step=step,
        sampling=sampling,
        flops=flops,
        preparation=preparation,
        blocks=tuple(block_sizes),
    ).with_optimizer(config.optimizer)


def _step(denoiser: Denoiser, trainable: Any, config: EraseConfig) -> tuple[int, int, int, int]:
    """The peak of the activations in a training step, which is a frozen pass, a trained one and its gradients; their
    peak while latents are drawn; the operations of a step, and those before the first."""
    size, accumulated = config.train_batch_size, config.gradient_accumulation_steps
    count = 2 * size if config.preservation_weight else size
    noisy, indices, conditioning = _given(denoiser, count)
    with _Memory(denoiser) as memory:
        with torch.no_grad(), trainable.frozen():
            wanted = denoiser.predict(noisy, indices, conditioning)
        plain, frozen = memory.peak, memory.flops
        with memory.without_cycles(config.gradient_checkpointing):
            read = denoiser.encode_batch(["a"] * count) if trainable.trains_text else conditioning
            loss = (denoiser.predict(noisy, indices, read).float() - wanted.float()).square().mean()
            gradients = torch.autograd.grad(loss, list(trainable.named_parameters().values()), allow_unused=True)
    # The states count the gradients; those of one batch do not yet exist where the activations peak.
    made = sum(_bytes(gradient) for gradient in gradients if gradient is not None)
    peak = memory.peak - (made if accumulated == 1 else 0)

    def without_gradients(samples: int) -> int:
        if samples == count:
            return plain
        given = _given(denoiser, samples)
        with torch.no_grad(), trainable.frozen(), _Memory(denoiser) as alone:
            denoiser.predict(*given)
        return alone.peak

    # The frozen model predicts several batches together, and for negative guidance the target, too.
    wanting = count + (size if config.negative_guidance else 0)
    together = min(max(2 * config.sample_batch_size // count, 1), config.frozen_batches or accumulated)
    peak = max(peak, without_gradients(together * wanting))
    # It draws a batch of latents; guidance may need a second prediction.
    guided = denoiser.guided_by_empty and config.sampling_guidance > denoiser.unguided_scale
    latents, predictions = sum(latent_counts(config)), 2 if guided else 1
    drawn = min(config.sample_batch_size, latents) * (1 if denoiser.guides_in_turn else predictions)
    sampling = without_gradients(drawn)
    kept, again = (batch_count(config), 0) if config.frozen_batches else (0, accumulated)
    flops = (memory.flops - frozen) * accumulated + frozen * again * wanting // count
    samples = latents * config.num_inference_steps * predictions + kept * wanting
    return peak, sampling, flops, frozen * samples // count


def _given(denoiser: Denoiser, count: int) -> tuple[Tensor, Tensor, Conditioning]:
    """What the denoiser reads of ``count`` samples: x_t, indices on the grid, and the conditioning."""
    noisy, indices = torch.randn(count, *denoiser.latent_shape), torch.zeros(count, dtype=torch.long)
    return noisy, indices, conditioning_shapes(denoiser, count)


class _Memory(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while they live, beyond the weights of a pipeline, and the
    operations of floating point.

    PyTorch's own counter of operations keeps the graphs of checkpointed layers alive, and PyTorch finds the shape of
    an output slowly. Most blocks repeat the same shapes, so each shape is found once.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self.cycles = False
        parts = [part for part in denoiser.pipeline.components.values() if isinstance(part, nn.Module)]
        self.known = {_storage(tensor) for part in parts for tensor in _weights(part)}
        self.found: dict[tuple[Any, ...], tuple[list[Any], int]] = {}
        """By operation and inputs: shape, stride and dtype of the outputs, or None for no tensor, and the cost."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, cost = self._compute(function, args, kwargs or {})
        self.flops += cost
        for one in _listed(made):
            if isinstance(one, Tensor):
                self._hold(one)
        return made

    def _compute(self, function: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        """What an operation makes, and its cost."""
        key = (function, *_looks(args), *_looks(kwargs.items())) if _is_pure(function) else (VALUES,)
        if key in self.found:
            outputs, cost = self.found[key]
            new = [one and torch.empty_strided(one[0], one[1], dtype=one[2], device="meta") for one in outputs]
            return (tuple(new) if len(new) > 1 else new[0]), cost
        made = function(*args, **kwargs)
        count = FLOPS.get(function._overloadpacket)
        cost = 0 if count is None else count(*args, **kwargs, out_val=made)
        outputs = _listed(made)
        tensors = [one for one in outputs if one is not None]
        if VALUES not in key and all(isinstance(one, Tensor) and one.is_meta for one in tensors):
            given = {_storage(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            # Some operations return a view of an input although their schema does not say so.
            if len(given | set(map(_storage, tensors))) == len(given) + len(tensors):
                self.found[key] = (
                    [one if one is None else (one.shape, one.stride(), one.dtype) for one in outputs],
                    cost,
                )
        return made, cost

    @contextlib.contextmanager
    def without_cycles(self, wanted: bool) -> Iterator[None]:
        """Within this context, if it is wanted, a new peak counts only after a search for cycles among new objects:
        checkpointed layers leave some, which hold their tensors until they are looked for."""
        if not wanted:
            yield
            return
        gc.collect()
        gc.freeze()
        self.cycles = True
        try:
            yield
        finally:
            self.cycles = False
            gc.unfreeze()

    def _hold(self, tensor: Tensor) -> None:
        storage, size = tensor.untyped_storage(), _bytes(tensor)
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        if self.now > self.peak * (LOOK_AGAIN if self.cycles else 1):
            if self.cycles:
                gc.collect()
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _listed(made: Any) -> list[Any]:
    return list(made) if isinstance(made, (tuple, list)) else [made]


def _looks(values: Iterable[Any]) -> Iterator[Any]:
    """What the shape of an output depends on; VALUES where that may be the numbers of a tensor."""
    for value in values:
        if isinstance(value, Tensor):
            yield (value.shape, value.stride(), value.dtype) if value.is_meta else VALUES
        elif isinstance(value, (tuple, list)):
            yield len(value)
            yield from _looks(value)
        else:
            yield type(value)  # 1 == 1.0 == True
            yield value


@functools.cache
def _is_pure(function: Any) -> bool:
    """Whether an operation makes new tensors and changes none."""
    schema = function._schema
    return not any(one.alias_info for one in (*schema.arguments, *schema.returns))


@contextlib.contextmanager
def _as_on_a_device(half: torch.dtype | None) -> Iterator[None]:
    """Within this context attention keeps no matrix of weights, as on every real device, and operations compute in the
    dtypes of autocast, which the meta device lacks.

    They are exchanged, not watched: checkpointed layers are computed again in a thread of autograd's own.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if half is not None:
            query, key, value, attn_mask = (_cast(one, half) for one in (query, key, value, attn_mask))
        causal, scale = bool(options.get("is_causal", False)), options.get("scale")
        attended: Tensor = _FLASH(query, key, value, 0.0, causal, attn_mask=attn_mask, scale=scale)[0]
        return attended

    def computed_in(dtype: torch.dtype, function: Any) -> Any:
        def compute(*args: Any, **options: Any) -> Any:
            args, options = tree_map(lambda one: _cast(one, dtype), (args, options))
            return function(*args, **options)

        return compute

    exchanged: list[tuple[Any, str, Any]] = [(functional, "scaled_dot_product_attention", attend)]
    if half is not None:
        exchanged += [(home, name, computed_in(half, getattr(home, name))) for home, name in HALVES]
        exchanged += [(home, name, computed_in(torch.float32, getattr(home, name))) for home, name in WHOLES]
    former = [(home, name, getattr(home, name)) for home, name, _ in exchanged]
    try:
        for home, name, function in exchanged:
            setattr(home, name, function)
        yield
    finally:
        for home, name, function in former:
            setattr(home, name, function)


def _cast(one: Any, dtype: torch.dtype) -> Any:
    return one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one


def _weights(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(part: nn.Module) -> int:
    return sum(_bytes(tensor) for tensor in _weights(part))


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
