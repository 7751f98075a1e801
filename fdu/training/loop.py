"""The training loop: each step erases with one half of its batch and preserves with the other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

import fdu_kernels
from fdu.config import EraseConfig
from fdu.models.denoiser import Denoiser
from fdu.training.cache import Cache, tensor_key
from fdu.training.checkpoint import Checkpoints
from fdu.training.examples import Batch, Examples, draw_batch, to_device
from fdu.training.frozen_layers import keeping_less
from fdu.training.interruption import Interruption, noticed
from fdu.training.methods import Trainable
from fdu.training.objective import Objective
from fdu.training.optimizer import make_optimizer
from fdu.training.sharding import sharded
from fdu.training.surgery import GradientSurgery
from fdu.training.timesteps import TimestepSampler
from fdu.training.tracking import Tracking

LOGGER = logging.getLogger(__name__)
CHECK_EVERY = 10
"""Steps between reads of the loss; each read waits for the device."""
PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Attributes that accelerate gives a module that it prepares."""
COLUMNS = ("loss", "divergence", "preservation", "distance", "critic")
"""The history of the training: one value per step each."""


class NotFinite(RuntimeError):
    """A loss or a trained weight became NaN or infinite."""


class Training:
    """One run of the loop, and all of its state.

    Args:
        accelerator: devices, precision and processes.
        denoiser, trainable: the model, and what of it is trained.
        examples: what to train on.
        objective: the losses.
        config: the settings.
        cache: where frozen outputs are kept for other runs.
        checkpoints: where to keep the state; None for nowhere.
        watch: called after each of the steps ``watched``, with the whole pipeline on the device.
        description: what the progress bar calls it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        denoiser: Denoiser,
        trainable: Trainable,
        examples: Examples,
        objective: Objective,
        config: EraseConfig,
        cache: Cache,
        checkpoints: Checkpoints | None = None,
        watched: Collection[int] = (),
        watch: Callable[[int], None] | None = None,
        description: str = "erase",
    ) -> None:
        self.accelerator, self.denoiser, self.trainable = accelerator, denoiser, trainable
        self.examples, self.objective, self.config = examples, objective, config
        self.cache, self.checkpoints = cache, checkpoints
        self.module = denoiser.module
        self.unprepared = {name: vars(self.module)[name] for name in PREPARED if name in vars(self.module)}
        self.watched, self.watch, self.description = watched, watch, description
        self.named = trainable.named_parameters()
        self.parameters = list(self.named.values())
        self.optimizer, self.schedule = make_optimizer(self.parameters, config)
        self.surgery = GradientSurgery(self.parameters) if config.gradient_surgery else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.sampler = TimestepSampler(config.timestep_sampling, len(denoiser.signal))
        # Neither text encoders nor a denoiser in shards have DDP around them.
        self.averages = trainable.trains_text or config.shard
        """Whether gradients are averaged over the processes here, and not during the backward pass."""
        self.frozen_batches: list[tuple[Batch, Tensor]] = []
        self.course: list[Tensor] = []
        self.step = 0
        self.looked = 0

    def run(self) -> dict[str, list[float]]:
        """Train to the end and return the history, a list of values for each of ``COLUMNS``.

        Raises:
            NotFinite: the loss became NaN or infinite.
            KeyboardInterrupt: a signal asked for it; the state is in a checkpoint, if there are any.
        """
        config, denoiser, module = self.config, self.denoiser, self.module
        tracking = Tracking(self.accelerator, config)
        keep = denoiser.text_encoders if self.trainable.trains_text else ()
        encoders_away = denoiser.without_encoders(keep)
        shards = sharded(module, self.parameters) if config.shard else nullcontext()
        lean = nullcontext() if config.compile else keeping_less(module)
        with _checkpointed(module, config.gradient_checkpointing), encoders_away, noticed() as stop, shards, lean:
            try:
                with self._prepared():
                    self._draw_frozen_batches()
                    self._resume()
                    self._loop(tracking, stop)
            finally:
                tracking.end()
        columns = torch.stack(self.course).T.tolist() if self.course else [[]] * len(COLUMNS)
        history = dict(zip(COLUMNS, columns, strict=True))
        return history if config.variational else {name: history[name] for name in COLUMNS if name != "critic"}

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Within this context the denoiser computes in the run's precision, and in DDP where there are processes."""
        accelerator, denoiser, module = self.accelerator, self.denoiser, self.module
        for name in PREPARED:
            if name != "forward":
                vars(module).pop(name, None)  # accelerate would take it for done
        try:
            # The schedule stays outside: accelerate would move it on once for every process.
            if self.averages:
                denoiser.module = accelerator.prepare_model(module, evaluation_mode=True)
                self.optimizer = accelerator.prepare_optimizer(self.optimizer)
            else:
                denoiser.module, self.optimizer = accelerator.prepare(module, self.optimizer)
            if self.config.compile:
                denoiser.module = cast(nn.Module, torch.compile(denoiser.module))
            yield
        finally:
            denoiser.module = module
            for name in PREPARED:
                vars(module).pop(name, None)
            vars(module).update(self.unprepared)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Within this context the whole pipeline is on the device, and draws as it will after the training."""
        attributes, dtype = vars(self.module), self.denoiser.dtype
        prepared = attributes.pop("forward", None)
        if "forward" in self.unprepared:
            attributes["forward"] = self.unprepared["forward"]
        if dtype.itemsize == 2:  # what is trained is still in float32
            attributes["forward"] = _under_autocast(self.module.forward, self.denoiser.device, dtype)
        try:
            with self.denoiser.with_encoders():
                yield
        finally:
            attributes.pop("forward", None)
            if prepared is not None:
                attributes["forward"] = prepared

    def _loop(self, tracking: Tracking, stop: Interruption) -> None:
        config = self.config
        if self.objective.game is not None and self.step == 0:
            self._warm_up()
        progress = tqdm(
            range(self.step, config.max_train_steps),
            initial=self.step,
            total=config.max_train_steps,
            desc=self.description,
            unit="step",
            **({} if self.accelerator.is_local_main_process else {"disable": True}),  # else TQDM_DISABLE decides
        )
        for step in progress:
            self.course.append(self._step())
            self.step = step + 1
            last, stopping = self.step == config.max_train_steps, self._stops(stop)
            saving = last or stopping or self.step % config.checkpointing_steps == 0
            if saving or step % CHECK_EVERY == 0:
                progress.set_postfix(s=f"{self._look(tracking):.3g}")
            if saving:
                self._save()
            if config.validation_prompts and (last or self.step % config.validation_steps == 0):
                with self._drawing():
                    tracking.validate(self.step, self.denoiser)
            if self.watch is not None and self.step in self.watched:
                with self._drawing():
                    self.watch(self.step)
            if stopping and not last:
                raise KeyboardInterrupt

    def _step(self) -> Tensor:
        """One optimizer step. Returns its values of ``COLUMNS``, means over the accumulated batches, [5]."""
        config, accelerator = self.config, self.accelerator
        terms = []
        parts = self._next_batches(self.step * config.gradient_accumulation_steps, config.gradient_accumulation_steps)
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else accelerator.no_sync(self.denoiser.module):
                terms.append(self._backward(*part))
        if self.averages:
            self._average_gradients()
            if self.surgery:
                with self.surgery.preserving():
                    self._average_gradients()
        if self.surgery:
            self.surgery.combine(config.preservation_weight)
        accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(terms).mean(0)

    def _backward(self, batch: Batch, wanted: Tensor) -> Tensor:
        """Forward and backward passes of one batch. Returns its values of ``COLUMNS``, [5]."""
        config, size = self.config, batch.size
        kept = wanted.new_zeros((), dtype=torch.float32)
        if self.surgery:
            # Each loss has passes of its own, so that its gradient is.
            with self.surgery.preserving():
                kept = self.objective.kept(self._predict(batch, slice(size, None)), wanted[size:])
                self._backpropagate(kept)
            predicted = self._predict(batch, slice(0, size))
        else:
            predicted = self._predict(batch, slice(0, None))
        erasing = predicted[:size]
        erased, critic = self._erased(erasing, wanted[:size], batch)
        if self.surgery:
            self._backpropagate(erased)
        else:
            if config.preservation_weight:
                kept = self.objective.kept(predicted[size:], wanted[size:])
            self._backpropagate(erased + config.preservation_weight * kept)
        with torch.no_grad():
            distances = fdu_kernels.squared_distance(
                erasing, wanted[:size], mask=self.objective.mask, distance=config.distance
            )
            loss = erased + config.preservation_weight * kept
            if self.sampler.adapts:
                losses = self.accelerator.gather(self.objective.losses(erasing, wanted[:size], batch))
                self.sampler.observe(self.accelerator.gather(batch.indices[:size]), losses)
            return torch.stack([term.float() for term in (loss, erased, kept, distances.median(), critic)])

    def _erased(self, predicted: Tensor, wanted: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The divergence to minimise, and the critic's bound of it, 0 without one."""
        if self.objective.game is not None:
            return self.objective.played(predicted, wanted, batch)
        erased = self.objective.erased(predicted, wanted, batch)
        return erased, torch.zeros_like(erased)

    @torch.no_grad()
    def _warm_up(self) -> None:
        """Let the critic of a variational game learn alone, before the first step."""
        quiet = not self.accelerator.is_local_main_process
        for number in tqdm(range(self.config.critic_warmup_steps), "critic", unit="step", disable=quiet):
            ((batch, wanted),) = self._next_batches(number, 1)
            self.objective.teach(self._predict(batch, slice(0, batch.size)), wanted[: batch.size], batch)

    def _predict(self, batch: Batch, part: slice) -> Tensor:
        """What the trained denoiser predicts for a part of the batch."""
        reads = batch.reads[part]
        if self.trainable.trains_text:
            prompts, place = reads.unique(return_inverse=True)
            with self.accelerator.autocast():
                conditioning = self.denoiser.encode_batch([self.examples.texts[index] for index in prompts.tolist()])
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
        """What the trained denoiser is to predict for each batch; as many samples a pass as in guided sampling."""
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

    def _draw_frozen_batches(self) -> None:
        """With frozen_batches, draw them all now, and what the frozen denoiser predicts, unless the cache has it."""
        config = self.config
        count = min(config.frozen_batches, config.max_train_steps * config.gradient_accumulation_steps)
        if not count:
            return
        batches = [self._draw().to("cpu") for _ in range(count)]

        def predict() -> dict[str, Tensor]:
            quiet = not self.accelerator.is_local_main_process
            progress = tqdm(self._wanted(batches), "frozen", total=count, unit="batch", disable=quiet)
            return {"wanted": torch.stack([wanted.cpu() for wanted in progress])}

        key: dict[str, Any] = {}
        if self.cache.folder is not None:
            # All that the frozen outputs depend on, beside the model.
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

    def _look(self, tracking: Tracking) -> float:
        """Wait for the losses since the last look, average them over the processes and log them.

        Returns the last median of s, which starts at s0 and means the same for all divergences; the loss does not.

        Raises:
            NotFinite: one of them is NaN or infinite.
        """
        recent = self.course[self.looked :]
        if not recent:
            return self._s(self.course[-1]) if self.course else math.nan
        values = self.accelerator.reduce(torch.stack(recent), "mean")
        self.course[self.looked :] = list(values)
        wrong = (~torch.isfinite(values[:, 0])).nonzero()
        if len(wrong):
            raise self._not_finite(f"the loss became {values[wrong[0, 0], 0].item()}", self.looked + int(wrong[0]))
        self.looked = len(self.course)
        learning_rate = self.schedule.get_last_lr()[0]
        figures = dict(zip(COLUMNS, values[-1].tolist(), strict=True))
        tracking.log(self.step, {**figures, "sigma": self.objective.sigma, "learning_rate": float(learning_rate)})
        return self._s(values[-1])

    def _s(self, values: Tensor) -> float:
        """The median of s in one step's values of ``COLUMNS``."""
        return float(values[COLUMNS.index("distance")]) / self.objective.sigma**2

    def _not_finite(self, what: str, step: int) -> NotFinite:
        kept = self.checkpoints.all() if self.checkpoints else []
        return NotFinite(
            f"{what} at step {step}; the pipeline draws as before"
            + (f", and the last good checkpoint is {str(kept[-1])!r}" if kept else "")
            + ". Restart with a lower learning_rate, or with a lower s0 if the divergence grows exponentially "
            "(pearson_chi2, alpha > 1)"
        )

    def _save(self) -> None:
        """Write a checkpoint, if there are to be any. A disk that is full costs this checkpoint, not the run."""
        if self.checkpoints is None:
            return
        finite = torch.stack([torch.isfinite(parameter).all() for parameter in self.parameters]).all()
        if not finite:
            raise self._not_finite("a trained weight became NaN or infinite", self.step)
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.save(self.step, self._state())
            except OSError as error:
                LOGGER.warning("checkpoint after step %d could not be written (%s); continuing", self.step, error)
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        """All that changes from step to step."""
        scaler, game = self.accelerator.scaler, self.objective.game
        return {
            "trained": {name: parameter.data for name, parameter in self.named.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "criterion": self.objective.criterion.state_dict(),
            "game": game.state_dict() if game is not None else None,
            "sampler": self.sampler.state_dict(),
            "generator": self.generator.get_state(),
            "course": torch.stack(self.course),
        }

    def _resume(self) -> None:
        """Go on from a checkpoint, if the settings ask for one and there is one."""
        wish = self.config.resume_from_checkpoint
        found = self.checkpoints.load(wish) if self.checkpoints is not None and wish is not None else None
        steps = gather_object([found[0] if found else None]) if self.accelerator.num_processes > 1 else []
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"the processes find different checkpoints (after steps {', '.join(map(str, steps))}); checkpoint_dir "
                "must be storage that all machines share"
            )
        if found is None:
            return
        self.step, state = found
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.data.copy_(state["trained"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.objective.criterion.load_state_dict(state["criterion"])
        self.sampler.load_state_dict(state["sampler"])
        self.generator.set_state(state["generator"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.objective.game is not None:
            self.objective.game.load_state_dict(state["game"])
        self.course = list(state["course"].to(self.denoiser.device))
        self.looked = len(self.course)

    def _stops(self, stop: Interruption) -> bool:
        """Whether to stop: at once where one process is alone, else when all have heard of it."""
        if self.accelerator.num_processes == 1:
            return stop.asked
        if self.step % CHECK_EVERY:
            return False
        asked = torch.tensor(float(stop.asked), device=self.denoiser.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)


def _under_autocast(forward: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    def computed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, dtype):
            return forward(*args, **kwargs)

    return computed


@contextmanager
def _checkpointed(module: Any, wanted: bool) -> Iterator[None]:
    """Within this context the module computes activations again in the backward pass, if that is wanted."""
    if not wanted or module.is_gradient_checkpointing:
        yield
        return
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()
