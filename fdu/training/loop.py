"""The training loop: a run from its first step, or a checkpoint, to its last; what a step does is in ``step.py``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from fdu.training.checkpoint import Checkpoints
from fdu.training.examples import Examples
from fdu.training.frozen_layers import keeping_less
from fdu.training.process_state import Interruption, noticed
from fdu.training.sharding import sharded
from fdu.training.step import COLUMNS, Stepper
from fdu.training.tracking import Tracking

LOGGER = logging.getLogger(__name__)
CHECK_EVERY = 10
"""Steps between reads of the loss; each read waits for the device."""
COOL_DOWN = 10
"""Steps in which the learning rate falls to 0 once ``stop_at`` is reached."""
PREPARED = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Attributes that accelerate gives a module that it prepares."""


class Searcher(Protocol):
    """Searches for what still draws the target; see :class:`fdu.training.adversary.Adversary`."""

    def due(self, step: int) -> bool:
        """Whether a search is due after so many steps."""

    def search(self) -> Examples:
        """Search with the model as it is now; the training data with all that was found so far."""

    def extended(self) -> Examples:
        """The training data with all that was found so far."""


class NotFinite(RuntimeError):
    """A loss or a trained weight became NaN or infinite."""


class Training:
    """One run of the loop, and all of its state.

    Args:
        stepper: takes the steps; has the model, what it is trained on, and the settings.
        checkpoints: where to keep the state; None for nowhere.
        watched: steps.
        watch: called after each of the steps ``watched``, with the whole pipeline on the device.
        description: what the progress bar calls it.
        adversary: searches between the steps for what still draws the target, and adds it to the training data.
        stop_when: looks at the validation images; the training ends once it returns True.
    """

    def __init__(
        self,
        stepper: Stepper,
        checkpoints: Checkpoints | None = None,
        watched: Collection[int] = (),
        watch: Callable[[int], None] | None = None,
        description: str = "erase",
        adversary: Searcher | None = None,
        stop_when: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self.stepper, self.checkpoints = stepper, checkpoints
        self.accelerator, self.denoiser, self.config = stepper.accelerator, stepper.denoiser, stepper.config
        self.objective, self.module, self.parameters = stepper.objective, stepper.denoiser.module, stepper.parameters
        self.unprepared = {name: vars(self.module)[name] for name in PREPARED if name in vars(self.module)}
        self.watched, self.watch, self.description = watched, watch, description
        self.adversary, self.stop_when = adversary, stop_when
        self.course: list[Tensor] = []
        self.step = 0
        self.last, self.cooling = self.config.max_train_steps, False
        self.before: Tensor | None = None
        self.interrupted = False
        """Whether a signal came in the last step, too late to stop."""
        self.looked = 0

    def run(self) -> dict[str, list[float]]:
        """Train to the end and return the history, a list of values for each of ``COLUMNS``.

        Raises:
            NotFinite: the loss became NaN or infinite.
            KeyboardInterrupt: a signal asked for it; the state is in a checkpoint, if there are any.
        """
        config, denoiser, module = self.config, self.denoiser, self.module
        tracking = Tracking(self.accelerator, config)
        keep = denoiser.text_encoders if self.stepper.trainable.trains_text else ()
        encoders_away = denoiser.others_on("cpu", keep)
        shards = sharded(module, self.parameters) if config.shard else nullcontext()
        lean = nullcontext() if config.compile else keeping_less(module)
        with checkpointed(module, config.gradient_checkpointing), encoders_away, noticed() as stop, shards, lean:
            try:
                with self._prepared():
                    self.stepper.draw_frozen_batches()
                    self._resume()
                    self.stepper.moving(True)
                    self._loop(tracking, stop)
                    self.stepper.moving(False)
                    self.interrupted = stop.noted
            finally:
                tracking.end()
        columns = torch.stack(self.course).T.tolist() if self.course else [[]] * len(COLUMNS)
        history = dict(zip(COLUMNS, columns, strict=True))
        return history if config.variational else {name: history[name] for name in COLUMNS if name != "critic"}

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """Within this context the denoiser computes in the run's precision, and in DDP where there are processes."""
        accelerator, denoiser, module, stepper = self.accelerator, self.denoiser, self.module, self.stepper
        for name in PREPARED:
            if name != "forward":
                vars(module).pop(name, None)  # accelerate would take it for done
        held = [accelerator._models, accelerator._optimizers]
        counts = list(map(len, held))
        try:
            # The schedule stays outside: accelerate would move it on once for every process.
            if stepper.averages:
                denoiser.module = accelerator.prepare_model(module, evaluation_mode=True)
                stepper.optimizer = accelerator.prepare_optimizer(stepper.optimizer)
            else:
                denoiser.module, stepper.optimizer = accelerator.prepare(module, stepper.optimizer)
            if self.config.compile:
                denoiser.module = cast(nn.Module, torch.compile(denoiser.module))
            yield
        finally:
            for kept, count in zip(held, counts, strict=True):
                del kept[count:]  # it would hold them, and ask all optimizers whether a step was skipped
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
            attributes["forward"] = torch.autocast(self.denoiser.device.type, dtype)(self.module.forward)
        self.stepper.moving(False)
        try:
            with self.denoiser.others_on(self.denoiser.device):
                yield
        finally:
            self.stepper.moving(True)
            attributes.pop("forward", None)
            if prepared is not None:
                attributes["forward"] = prepared

    def _loop(self, tracking: Tracking, stop: Interruption) -> None:
        config = self.config
        if config.init != "none" and self.step == 0:
            self.stepper.calibrate()
        if self.objective.game is not None and self.step == 0:
            quiet = not self.accelerator.is_local_main_process
            for number in tqdm(range(config.critic_warmup_steps), "critic", unit="step", disable=quiet):
                self.stepper.teach(number)
        if config.stop_at and self.step == 0:
            self.before = self.accelerator.reduce(self.stepper.distance_before(CHECK_EVERY), "mean")
        self._search()  # for a run that was killed in a search
        progress = tqdm(
            range(self.step, self.last),
            initial=self.step,
            total=self.last,
            desc=self.description,
            unit="step",
            **({} if self.accelerator.is_local_main_process else {"disable": True}),  # else TQDM_DISABLE decides
        )
        for step in progress:
            self.course.append(self.stepper.step(self.step))
            self.step = step + 1
            last, stopping = self.step == self.last, self._stops(stop)
            searching = self.adversary is not None and self.adversary.due(self.step)
            saving = last or stopping or searching or self.step % config.checkpointing_steps == 0
            if saving or step % CHECK_EVERY == 0:
                progress.set_postfix(s=f"{self._look(tracking):.3g}")
            done = step % CHECK_EVERY == 0 and self._erased()
            if config.validation_prompts and (last or self.step % config.validation_steps == 0):
                with self._drawing():
                    images = tracking.validate(self.step, self.denoiser)
                done = done or self._suffices(images)
            if done and not last and not self.cooling:
                self.last, self.cooling = min(self.step + COOL_DOWN, self.last), True
                self.stepper.cool_down(COOL_DOWN)
            if saving:
                self._save()
            if self.watch is not None and self.step in self.watched:
                with self._drawing():
                    self.watch(self.step)
            if stopping and not last:
                raise KeyboardInterrupt
            self._search()
            if last:
                break

    def _search(self) -> None:
        """Make the searches that are due, and train on with what they find."""
        while self.adversary is not None and self.adversary.due(self.step):
            with self._drawing():
                self.stepper.examples = self.adversary.search()
            self.stepper.optimizer.zero_grad(set_to_none=True)  # a search may have left some

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
        learning_rate = self.stepper.schedule.get_last_lr()[0]
        figures = dict(zip(COLUMNS, values[-1].tolist(), strict=True))
        tracking.log(self.step, {**figures, "sigma": self.objective.sigma, "learning_rate": float(learning_rate)})
        return self._s(values[-1])

    def _erased(self) -> bool:
        """Whether the steps since the last look are as close to their targets as ``stop_at`` asks for, for the first
        time."""
        if self.before is None or self.cooling or self.step < CHECK_EVERY:
            return False
        recent = torch.stack(self.course[-CHECK_EVERY:])[:, COLUMNS.index("distance")].mean()
        return bool(recent <= self.config.stop_at * self.before)

    def _suffices(self, images: Tensor | None) -> bool:
        """Whether ``stop_when`` is content with the images, which the main process has."""
        if self.stop_when is None:
            return False
        try:
            found = images is not None and bool(self.stop_when(images))
        except Exception as error:  # the user's function; its fault must not cost the training
            LOGGER.warning("stop_when failed (%r); the training goes on", error)
            found = False
        return any(gather_object([found])) if self.accelerator.num_processes > 1 else found

    def _s(self, values: Tensor) -> float:
        """The median of s in one step's values of ``COLUMNS``."""
        return float(values[COLUMNS.index("distance")]) / self.objective.sigma**2

    def _not_finite(self, what: str, step: int) -> NotFinite:
        kept = self.checkpoints.all() if self.checkpoints else []
        return NotFinite(
            f"{what} at step {step}; the pipeline draws as before"
            + (f", and the last good checkpoint is {str(kept[-1])!r}" if kept else "")
            + ". Restart with a lower learning_rate, or with a lower s0 if the divergence grows exponentially "
            "(pearson_chi2, alpha > 1). Help: NaN (docs/help/nan.md)"
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

    @property
    def _stateful(self) -> dict[str, Any]:
        """The objects with a state."""
        found = {
            "optimizer": self.stepper.optimizer,
            "schedule": self.stepper.schedule,
            "scaler": self.accelerator.scaler,
            "criterion": self.objective.criterion,
            "game": self.objective.game,
            "sampler": self.stepper.sampler,
            "adversary": self.adversary,
        }
        return {name: one for name, one in found.items() if one is not None}

    def _state(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {
            **{name: one.state_dict() for name, one in self._stateful.items()},
            "trained": {name: parameter.data for name, parameter in self.stepper.named.items()},
            "generator": self.stepper.generator.get_state(),
            "course": torch.stack(self.course),
            "last": self.last,
            "cooling": self.cooling,
            "before": self.before,
        }

    def _resume(self) -> None:
        """Go on from a checkpoint, if the settings ask for one and there is one."""
        choice = self.config.resume_from_checkpoint
        found = self.checkpoints.load(choice) if self.checkpoints is not None and choice is not None else None
        steps = gather_object([found[0] if found else None]) if self.accelerator.num_processes > 1 else []
        if len(set(steps)) > 1:
            raise RuntimeError(
                f"the processes find different checkpoints (after steps {', '.join(map(str, steps))}); checkpoint_dir "
                "must be storage that all machines share"
            )
        if found is None:
            return
        self.step, state = found
        try:
            self._restore(state)
        except torch.OutOfMemoryError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoint after step {self.step} does not fit this run ({type(error).__name__}: {error}); "
                "it may be of another version of fdu or its libraries: use the one that wrote it, or start from scratch"
            ) from error

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`_state`."""
        self.last, self.before = state.get("last", self.last), state.get("before")
        self.cooling = state.get("cooling", False)
        if self.cooling:
            self.stepper.cool_down(COOL_DOWN)
        with torch.no_grad():
            for name, parameter in self.stepper.named.items():
                parameter.data.copy_(state["trained"][name])
        for name, one in self._stateful.items():
            one.load_state_dict(state[name])
        if self.adversary is not None:
            self.stepper.examples = self.adversary.extended()
        self.stepper.generator.set_state(state["generator"])
        self.course = list(state["course"].to(self.denoiser.device))
        self.looked = len(self.course)

    def _stops(self, stop: Interruption) -> bool:
        """Whether to stop: at once where one process is alone, else when all have heard of it."""
        if self.accelerator.num_processes == 1:
            return stop.noted
        if self.step % CHECK_EVERY:
            return False
        asked = torch.tensor(float(stop.noted), device=self.denoiser.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)


@contextmanager
def checkpointed(module: Any, wanted: bool) -> Iterator[None]:
    """Within this context the module computes activations again in the backward pass, if that is wanted."""
    if not wanted or module.is_gradient_checkpointing:
        yield
        return
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()
