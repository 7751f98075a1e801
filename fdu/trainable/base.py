"""What the loop needs of a training method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

from torch import Tensor, nn


class Trainable(Protocol):
    """The trained part of a pipeline, and the frozen model beside it in one and the same backbone."""

    trains_text: ClassVar[bool]
    """Whether text encoders are trained, so that prompts have to be encoded anew in every step."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, fp32, under names that stay the same from run to run."""

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Within this context the pipeline computes what it did before the erasure."""

    def finish(self) -> None:
        """End the training: no more gradients, parameters in the dtype of their model."""

    def remove(self) -> None:
        """Undo everything: the pipeline computes what it did before, and carries nothing more."""

    def lora_layers(self) -> dict[str, dict[str, Tensor]] | None:
        """LoRA weights in diffusers' names, by the pipeline's attribute ("unet", "transformer", "text_encoder"); None if
        the method trains no adapter."""

    def changed_weights(self) -> dict[str, tuple[Tensor, Tensor]] | None:
        """Each weight that the training may have changed: "attribute.parameter" -> (before, after), both in the model's
        dtype; None for adapters."""
