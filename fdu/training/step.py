"""The step of the loop: forward and backward passes of its batches, then one move of the optimizer.

Each batch erases with one half of its samples and preserves with the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler
from tqdm import tqdm

import fdu_kernels
from fdu.config import SHAPES, EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.models.staging import staged, to_device
from fdu.training.cache import Cache, tensor_key
from fdu.training.examples import Batch, Examples, batch_count, draw_batch, plus
from fdu.training.methods.trainable import Trainable
from fdu.training.objective import Objective
from fdu.training.surgery import GradientSurgery
from fdu.training.timesteps import DENSITIES, TimestepSampler

COLUMNS = ("loss", "divergence", "preservation", "distance", "critic")
"""The history of the training: one value per step each."""


@dataclasses.dataclass(eq=False)
class Stepper:
    """Takes the steps of a run: draws the batches, trains on them, and has the optimizer with its schedule."""

    accelerator: Accelerator
    """Devices, precision and processes."""
    denoiser: Denoiser
    """The model."""
    trainable: Trainable
    """Its trained part."""
    examples: Examples
    """The training data."""
    objective: Objective
    """The losses."""
    config: EraseConfig
    cache: Cache
    """Where frozen outputs are kept for other runs."""

    def __post_init__(self) -> None:
        self.named = self.trainable.named_parameters()
        self.parameters = list(self.named.values())
        self.optimizer, self.schedule = make_optimizer(self.parameters, self.config)
        self.surgery = GradientSurgery(self.parameters) if self.config.gradient_surgery else None
        self.generator = torch.Generator().manual_seed(self.config.seed)
        config = self.config
        drawn_by = config.weighting_scheme if config.weighting_scheme in DENSITIES else config.timestep_sampling
        shape = {name: getattr(config, name) for name in SHAPES}
        self.sampler = TimestepSampler(drawn_by, len(self.denoiser.signal), **shape)
        # Neither text encoders nor a denoiser in shards have DDP around them.
        self.averages = self.trainable.trains_text or self.config.shard
        """Whether gradients are averaged over the processes here, and not during the backward pass."""
        self.frozen_batches: list[tuple[Batch, Tensor]] = []
        self._scale: float | None = None  # of the losses after the last step

    def step(self, number: int) -> Tensor:
        """The step of this number. Returns its values of ``COLUMNS``, means over the accumulated batches, [5]."""
        config, accelerator = self.config, self.accelerator
        terms = []
        parts = self._next_batches(number * config.gradient_accumulation_steps, config.gradient_accumulation_steps)
        for place, part in enumerate(parts, 1):
            with nullcontext() if place == len(parts) else accelerator.no_sync(self.denoiser.module):
                terms.append(self._backward(*part))
        if self.averages:
            self._average_gradients()
            if self.surgery:
                with self.surgery.preserving():
                    self._average_gradients()
        if self.surgery:
            self.surgery.combine(config.preservation_weight)
        accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
        if self._move():
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(terms).mean(0)

    def _move(self) -> bool:
        """Move the optimizer; whether it moved. Where losses are scaled (fp16), it does not if the gradients overflow.

        accelerate would not notice that of a fused optimizer, which skips the step by itself. Reading the scale, which
        falls then and only then, makes the host wait.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            self.optimizer.step()
            return True
        before = scaler.get_scale() if self._scale is None else self._scale
        self.optimizer.step()
        self._scale = scaler.get_scale()
        return self._scale >= before

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set an automatic sigma by the outputs of the frozen model: those of an edited one are near their targets."""
        for batch, predicted, wanted in self._frozen_outputs(self.objective.criterion.calibration_calls):
            self.objective.observe(predicted, wanted, batch)

    @torch.no_grad()
    def distance_before(self, batches: int) -> Tensor:
        """The median squared distance of the frozen model's outputs from their targets, over the first batches, []."""
        return torch.stack([self._distance(*outputs) for _, *outputs in self._frozen_outputs(batches)]).mean()

    def moving(self, on: bool) -> None:
        """Have the weights that gradients are taken at, or those that the training gives: without a schedule they
        differ."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if hasattr(optimizer, "eval"):
            (optimizer.train if on else optimizer.eval)()

    def cool_down(self, steps: int) -> None:
        """Let the learning rate fall to 0 within so many steps, from what it is now."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # without what accelerate puts around it
        self.schedule = LinearLR(optimizer, 1.0, 0.0, steps)

    def _frozen_outputs(self, batches: int) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """The first batches, the frozen model's outputs for the target's prompts, and their targets.

        The training draws these batches again.
        """
        state = self.generator.get_state()
        for number in range(batches):
            ((batch, wanted),) = self._next_batches(number, 1)
            with self.trainable.frozen():
                predicted = self._predict(batch, slice(0, batch.size))
            yield batch, predicted, wanted[: batch.size]
        self.generator.set_state(state)

    def _distance(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """The median squared distance of erasing outputs from their targets, []."""
        mask, distance = self.objective.mask, self.config.distance
        return fdu_kernels.squared_distance(predicted, wanted, mask=mask, distance=distance).median()

    @torch.no_grad()
    def teach(self, number: int) -> None:
        """Let the critic of a variational game learn alone from the ``number``-th batch."""
        ((batch, wanted),) = self._next_batches(number, 1)
        self.objective.teach(self._predict(batch, slice(0, batch.size)), wanted[: batch.size], batch)

    def _backward(self, batch: Batch, wanted: Tensor) -> Tensor:
        """Forward and backward passes of one batch. Returns its values of ``COLUMNS``, [5]."""
        config, size = self.config, batch.size
        kept = wanted.new_zeros((), dtype=torch.float32)
        if self.surgery:
            # Separate passes for separate gradients.
            with self.surgery.preserving():
                kept = self.objective.kept(self._predict(batch, slice(size, None)), wanted[size:])
                self._backpropagate(kept)
            predicted = self._predict(batch, slice(0, size))
        else:
            predicted = self._predict(batch, slice(0, None))
        erasing = predicted[:size]
        erased, critic, s = self.objective.erased(erasing, wanted[:size], batch)
        if self.surgery:
            self._backpropagate(erased)
        else:
            if config.preservation_weight:
                kept = self.objective.kept(predicted[size:], wanted[size:])
            self._backpropagate(erased + config.preservation_weight * kept)
        with torch.no_grad():
            loss = erased + config.preservation_weight * kept
            if self.sampler.adapts:
                losses = self.accelerator.gather(self.objective.losses(s, batch))
                self.sampler.observe(self.accelerator.gather(batch.indices[:size]), losses)
            terms = (loss, erased, kept, self.objective.distance(s, batch), critic)
            return torch.stack([term.float() for term in terms])

    def _predict(self, batch: Batch, part: slice) -> Tensor:
        """The trained denoiser's outputs for a part of the batch."""
        reads = batch.reads[part]
        if self.trainable.trains_text:
            prompts, place = reads.unique(return_inverse=True)
            with self.accelerator.autocast(), staged(self.denoiser.pipeline):
                conditioning = self.denoiser.encode_batch([self.examples.texts[index] for index in prompts.tolist()])
            if self.examples.added is not None:
                conditioning = plus(conditioning, self.examples.added[to_device(prompts, self.denoiser.device)].tensors)
        else:
            conditioning, place = self.examples.conditioning, reads
        conditioning = conditioning[to_device(place, self.denoiser.device)]
        return self.denoiser.predict(batch.noisy[part], batch.indices[part], conditioning)

    def _backpropagate(self, loss: Tensor) -> None:
        self.accelerator.backward(loss / self.config.gradient_accumulation_steps)

    def _average_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is not None:  # some text encoders have layers behind the one that is read
                parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def draw_frozen_batches(self) -> None:
        """If frozen_batches is set, draw all batches now and compute the frozen denoiser's predictions for them, or
        read those from the cache."""
        config = self.config
        count = batch_count(config)
        if not config.frozen_batches or not count:
            return
        batches = [self._draw().to("cpu") for _ in range(count)]

        def predict() -> dict[str, Tensor]:
            quiet = not self.accelerator.is_local_main_process
            progress = tqdm(self._wanted(batches), "frozen", total=count, unit="batch", disable=quiet)
            return {"wanted": torch.stack([wanted.cpu() for wanted in progress])}

        key: dict[str, Any] = {}
        if self.cache.folder is not None:
            # All that the frozen outputs depend on, besides the model.
            key = {
                "batches": [tensor_key(batch.noisy, batch.indices, batch.reads, batch.anchors) for batch in batches],
                "size": config.train_batch_size,
                "conditioning": tensor_key(*self.examples.conditioning.tensors.values()),
                **{name: getattr(config, name) for name in ("objective", "negative_guidance", "mixed_precision")},
                "process": self.accelerator.process_index,
            }
        wanted = self.cache.get("frozen", key, predict, every_process=True)["wanted"]
        self.frozen_batches = list(zip(batches, wanted.cpu(), strict=True))
        if self.denoiser.device.type == "cuda":
            # In memory from which a GPU copies by itself.
            self.frozen_batches = [(batch.pinned(), wanted.pin_memory()) for batch, wanted in self.frozen_batches]

    def _next_batches(self, number: int, count: int) -> list[tuple[Batch, Tensor]]:
        """``count`` batches from the ``number``-th of the run on, and what the trained denoiser is to predict."""
        if self.frozen_batches:
            device, kept = self.denoiser.device, self.frozen_batches
            chosen = [kept[index % len(kept)] for index in range(number, number + count)]
            return [(batch.to(device), wanted.to(device, non_blocking=True)) for batch, wanted in chosen]
        batches = [self._draw() for _ in range(count)]
        return list(zip(batches, self._wanted(batches), strict=True))

    @torch.no_grad()
    def _wanted(self, batches: list[Batch]) -> Iterator[Tensor]:
        """The training targets of each batch, with as many samples per pass as in guided sampling."""
        together = max(2 * self.config.sample_batch_size // len(batches[0].noisy), 1)
        with self.trainable.frozen():
            for start in range(0, len(batches), together):
                some = batches[start : start + together]
                joined = Batch.joined(some).to(self.denoiser.device)
                yield from joined.parted(self.objective.wanted(self.denoiser, self.examples, joined), len(some))

    def _draw(self) -> Batch:
        accelerator = self.accelerator
        return draw_batch(
            self.denoiser,
            self.examples,
            self.config,
            self.sampler,
            self.generator,
            accelerator.process_index,
            accelerator.num_processes,
        )


def make_optimizer(parameters: Sequence[nn.Parameter], config: EraseConfig) -> tuple[Optimizer, LRScheduler]:
    """The optimizer over the trained parameters, and the schedule of its learning rate."""
    optimizer: Optimizer
    settings: dict[str, Any] = {
        "lr": config.peak_learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw_8bit":
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(parameters, **settings)
    elif config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        # As in diffusers' training scripts.
        optimizer = Prodigy(parameters, use_bias_correction=True, safeguard_warmup=True, **settings)
    elif config.optimizer == "schedule_free":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(parameters, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=all(each.is_cuda for each in parameters) or None, **settings)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return optimizer, schedule
