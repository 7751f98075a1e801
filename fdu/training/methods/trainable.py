"""The interface of a training method: trained parameters, and the frozen model in the same backbone.

Erasures of one pipeline stack: the frozen model of an earlier one excludes the later ones, and the last one must be
removed first.
"""

from __future__ import annotations

import dataclasses
import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from typing import Literal

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from fdu.config import TRAIN_METHODS, check_choice
from fdu.models.denoiser import Denoiser
from fdu.training.closed_form import Edit


@dataclasses.dataclass(frozen=True)
class Request:
    """The input of a training method."""

    method: str
    """A name in ``fdu.config.TRAIN_METHODS``; several methods may share a file."""
    rank: int
    """Rank of adapters."""
    lora_alpha: float
    """Scale of adapters: their update is multiplied by lora_alpha / rank."""
    target_names: Sequence[str]
    prompts: Sequence[str]
    """The prompts of the target."""
    kept_prompts: Sequence[str] = ()
    """The prompts of the anchor and the prompts to preserve."""
    adapter_layers: str = "text"
    """Layers that get adapters: a name of ``Denoiser.layer_groups``."""

    edits: Sequence[Edit] = ()
    """Edits that the trained weights begin at."""
    by_shape: bool = False
    """Whether the model consists of shapes alone, to see what a training would need."""

    @property
    def edited(self) -> tuple[str, ...]:
        """The names of the layers of the denoiser that are edited."""
        return tuple(layer for edit in self.edits for layer in edit.ups)

    def check_found(self, names: Collection[str], denoiser: Denoiser) -> None:
        """Raise ValueError if the method found nothing to train."""
        if not names:
            raise ValueError(
                f"train_method {self.method!r} finds nothing to train in this {type(denoiser.pipeline).__name__}; "
                "choose another one"
            )


class Trainable(ABC):
    """The trained part of a pipeline. Everything else of it is frozen until the training ends.

    Nothing here touches a tensor that autograd may have saved, so :meth:`frozen` may also be entered and left between a
    forward pass and its backward pass, with gradient checkpointing too. The backward pass itself must run outside.
    """

    trains_text: bool
    """Whether text encoders are trained, so that each step must encode its prompts again."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.state: Literal["training", "finished", "removed"] = "training"
        self._flags = flags_of(pipeline)
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        # The pipeline itself must not be held here, or no entry would ever go.
        self._stack = _STACKS.setdefault(pipeline, [])

    @abstractmethod
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, fp32, under names that stay the same from run to run."""

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this context the pipeline computes, bit for bit, what it did before the erasure.

        Adapters that the user has added, and switched on or off since then, stay as they are.

        Raises:
            RuntimeError: it cannot be switched off: it has been fused into the weights, or a later erasure of the
                pipeline is in place and its result is gone.
        """
        with ExitStack() as stack:
            if self.state != "removed":
                for trainable in reversed([self, *self._later()]):
                    stack.enter_context(trainable._off())
            yield

    def finish(self) -> None:
        """End the training: parameters in the dtype of their model, and the user's requires_grad flags come back."""
        if self.state == "training":
            self._settle()
            restore(self._flags)
            self.state = "finished"

    def remove(self) -> None:
        """Undo everything: the pipeline computes, bit for bit, what it did before, and carries nothing more.

        Raises:
            RuntimeError: another erasure was made after this one, or this one has been fused into the weights.
        """
        if self.state == "removed":
            return
        if self._later():
            raise RuntimeError("a later erasure is on top of this one; remove that one first")
        self._undo()
        restore(self._flags)
        self.state = "removed"
        self._stack[:] = [reference for reference in self._stack if reference() is not self]

    def lora_layers(self) -> dict[str, dict[str, Tensor]] | None:
        """LoRA weights in diffusers' names, by the pipeline's attribute ("unet", "transformer"); None without an
        adapter."""
        return None

    def changed_weights(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """Each weight that the training may have changed: "attribute.parameter", as a pipeline without adapters calls
        it, -> (before, after), both in the model's dtype; None with an adapter."""
        return None

    def begin_at(self, denoiser: Denoiser, edits: Sequence[Edit]) -> None:
        """Let the trained weights begin at edits of layers that are among them."""
        assert not edits, f"{type(self).__name__} has no layers to edit"

    @abstractmethod
    def _off(self) -> AbstractContextManager[None]:
        """Within this context the pipeline is without this erasure. May be nested."""

    @abstractmethod
    def _settle(self) -> None:
        """End the training, except for the flags."""

    @abstractmethod
    def _undo(self) -> None:
        """Undo the erasure, except for the flags."""

    def _later(self) -> list[Trainable]:
        """The erasures made after this one, in their order."""
        references = list(self._stack)
        place = next(place for place, reference in enumerate(references) if reference() is self)
        later = [reference() for reference in references[place + 1 :]]
        found = [trainable for trainable in later if trainable is not None]
        if len(found) < len(later):
            raise RuntimeError(
                "a later erasure on top of this one was discarded, so it cannot be switched off; "
                "keep every result as long as you need an earlier one, or load the pipeline afresh"
            )
        return found


_STACKS: weakref.WeakKeyDictionary[DiffusionPipeline, list[weakref.ref[Trainable]]] = weakref.WeakKeyDictionary()
"""The erasures that are in place, by pipeline, the oldest first."""


def put_on_top(trainable: Trainable) -> None:
    """Enter a new erasure as the last one of its pipeline."""
    trainable._stack.append(weakref.ref(trainable))


def attach(denoiser: Denoiser, request: Request) -> Trainable:
    """Make the part of a pipeline that a method names trainable, and everything else frozen.

    The method's file defines ``make(denoiser: Denoiser, request: Request) -> Trainable``, which is called here.

    Args:
        denoiser: the denoiser of the pipeline, not yet wrapped for several devices.
        request: the method and its settings.

    Raises:
        ValueError: an unknown method, or one that finds nothing to train in this pipeline.
        RuntimeError: another erasure of the pipeline is still in training.
    """
    check_choice("train_method", request.method, TRAIN_METHODS)
    others = [reference() for reference in _STACKS.get(denoiser.pipeline, [])]
    if any(other is not None and other.state == "training" for other in others):
        raise RuntimeError("another erasure of this pipeline is still in training; call its finish() or remove() first")
    make = import_module(f"{__package__}.{TRAIN_METHODS[request.method].module}").make
    flags = flags_of(denoiser.pipeline)
    try:
        trainable: Trainable = make(denoiser, request)
        try:
            trainable.begin_at(denoiser, request.edits)
        except BaseException:
            trainable._undo()
            raise
    except BaseException:
        restore(flags)
        raise
    put_on_top(trainable)
    return trainable


Flags = list[tuple[nn.Parameter, bool]]


def flags_of(owner: DiffusionPipeline | nn.Module) -> Flags:
    """The requires_grad flags of all parameters of a module, or of all models of a pipeline."""
    models = [owner] if isinstance(owner, nn.Module) else [x for x in vars(owner).values() if isinstance(x, nn.Module)]
    return [(parameter, parameter.requires_grad) for model in models for parameter in model.parameters()]


def restore(flags: Flags) -> None:
    """Set requires_grad flags, and empty the list, which would keep every parameter in memory."""
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    flags.clear()
